package logic

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// argon2id as OWASP advises it: 19 MiB, two passes.
const (
	argonKiB     = 19 << 10
	argonPasses  = 2
	argonThreads = 1
	argonKey     = 32
	argonSalt    = 16
)

const (
	minPassword  = 8
	maxPassword  = 128
	maxGuestName = 32

	guestPrefix = "guest-"
)

var usernamePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{1,31}$`)

var (
	errTaken  = errors.New("the user name is taken")
	errFull   = errors.New("no room for more users")
	errWrong  = errors.New("wrong user name or password")
	errInput  = errors.New("invalid") // wrapped by fieldError
	encoding  = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
	dummySalt = make([]byte, argonSalt)
)

// fieldError says which rule a field breaks.
type fieldError string

func (e fieldError) Error() string { return string(e) }
func (fieldError) Unwrap() error   { return errInput }

// user is immutable.
type user struct {
	id, name   string
	salt, hash []byte // nil: a guest
}

func (u *user) guest() bool { return u.hash == nil }

// users is the directory of users. All methods may be called from any goroutine.
type users struct {
	max     int
	hashing chan struct{} // bounds how many passwords are hashed at once, 19 MiB each
	dummy   []byte        // what the password of an unknown user is compared to
	expired func(id string) bool

	mu   sync.RWMutex
	byID map[string]*user
}

// newUsers returns an empty directory. expired reports whether a guest may be forgotten.
func newUsers(limit int, expired func(id string) bool) *users {
	return &users{
		max:     limit,
		hashing: make(chan struct{}, runtime.GOMAXPROCS(0)),
		dummy:   make([]byte, argonKey),
		expired: expired,
		byID:    make(map[string]*user),
	}
}

// userID is the id of a registered user: names that differ in case only are one user's.
func userID(username string) string { return strings.ToLower(username) }

func (s *users) register(ctx context.Context, name, password string) (*user, error) {
	switch {
	case !usernamePattern.MatchString(name):
		return nil, fieldError("username: 2 to 32 of a-z, A-Z, 0-9, '_', '.', '-', the first a letter or digit")
	case strings.HasPrefix(userID(name), guestPrefix):
		return nil, fieldError("username: " + guestPrefix + " is for guests")
	case len(password) < minPassword || len(password) > maxPassword:
		return nil, fieldError("password: 8 to 128 bytes")
	case !utf8.ValidString(password):
		return nil, fieldError("password: not UTF-8")
	}
	u := &user{id: userID(name), name: name, salt: make([]byte, argonSalt)}
	s.mu.RLock()
	taken := s.byID[u.id] != nil
	s.mu.RUnlock()
	if taken { // looked at before the expensive part; add decides
		return nil, errTaken
	}
	_, _ = rand.Read(u.salt) // never fails
	var err error
	if u.hash, err = s.hash(ctx, password, u.salt); err != nil {
		return nil, err
	}
	if err := s.add(u); err != nil {
		return nil, err
	}
	return u, nil
}

// login takes as long for an unknown user as for a wrong password.
func (s *users) login(ctx context.Context, name, password string) (*user, error) {
	if name == "" || password == "" {
		return nil, fieldError("username and password must not be empty")
	}
	if len(password) > maxPassword {
		return nil, errWrong
	}
	s.mu.RLock()
	u := s.byID[userID(name)]
	s.mu.RUnlock()
	known := u != nil && !u.guest()
	salt, want := dummySalt, s.dummy
	if known {
		salt, want = u.salt, u.hash
	}
	got, err := s.hash(ctx, password, salt)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(got, want) != 1 || !known {
		return nil, errWrong
	}
	return u, nil
}

// newGuest returns a guest who is not in the directory yet.
func newGuest(name string) (*user, error) {
	name = strings.TrimSpace(name)
	if name == "" || utf8.RuneCountInString(name) > maxGuestName || !printable(name) {
		return nil, fieldError("guest_name: 1 to 32 printable characters")
	}
	var random [10]byte
	_, _ = rand.Read(random[:])
	return &user{id: guestPrefix + encoding.EncodeToString(random[:]), name: name}, nil
}

func (s *users) add(u *user) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[u.id] != nil {
		return errTaken
	}
	if len(s.byID) >= s.max {
		for id, other := range s.byID {
			if other.guest() && s.expired(id) {
				delete(s.byID, id)
			}
		}
		if len(s.byID) >= s.max {
			return errFull
		}
	}
	s.byID[u.id] = u
	return nil
}

func (s *users) get(id string) *user {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.byID[id]
}

// name implements directory.
func (s *users) name(id string) (string, bool) {
	if u := s.get(id); u != nil {
		return u.name, true
	}
	return id, false
}

// resolve implements directory: people write Bob for bob.
func (s *users) resolve(name string) string {
	if s.get(name) == nil && s.get(userID(name)) != nil {
		return userID(name)
	}
	return name
}

func (s *users) hash(ctx context.Context, password string, salt []byte) ([]byte, error) {
	select {
	case s.hashing <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-s.hashing }()
	return argon2.IDKey([]byte(password), salt, argonPasses, argonKiB, argonThreads, argonKey), nil
}

func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}
