package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"im-gateway/transport"
)

// tokenKeys is what tokens are checked by: the check, and the published key sets that it uses.
type tokenKeys struct {
	verifier *transport.Verifier
	sets     map[keySetID]*transport.KeySet
}

// keySetID tells key sets apart.
type keySetID struct {
	issuer, url string
	refresh     time.Duration
}

// newTokenKeys makes the check of tokens. Of the key sets those in use stay, others have no keys yet. files
// are the contents of key files, as far as they were read already.
func newTokenKeys(a Auth, files files, denials *transport.Denials, inUse map[keySetID]*transport.KeySet,
	log zerolog.Logger) (*tokenKeys, error) {
	k := &tokenKeys{sets: map[keySetID]*transport.KeySet{}}
	keys := func(issuer, file, url string) (pem []byte, set *transport.KeySet, err error) {
		switch {
		case url != "":
			id := keySetID{issuer, url, a.JWKSRefresh}
			if set = inUse[id]; set == nil {
				set, err = transport.NewKeySet(transport.KeySetOptions{
					URL: url, Issuer: issuer, Refresh: a.JWKSRefresh, Logger: log,
				})
			}
			k.sets[id] = set
		case file != "":
			pem, err = files.text(file)
		}
		return pem, set, err
	}
	o := transport.VerifierOptions{
		Algorithm: a.Algorithm, Secret: []byte(a.HS256Secret), PreviousSecret: []byte(a.PreviousSecret),
		Issuer: a.Issuer, Audience: a.Audience, Leeway: a.Leeway, Denials: denials,
	}
	var err error
	if o.PublicKeyPEM, o.KeySet, err = keys(a.Issuer, a.PublicKeyFile, a.JWKSURL); err != nil {
		return nil, fmt.Errorf("auth.public_key_file: %w", err)
	}
	for _, s := range a.Issuers {
		i, err := parseIssuer(s)
		if err != nil {
			return nil, fmt.Errorf("auth.issuers: %w", err)
		}
		next := transport.Issuer{Name: i.name, Audience: i.audience, Algorithms: i.algorithms}
		if next.PublicKeyPEM, next.KeySet, err = keys(i.name, i.keyFile, i.jwksURL); err != nil {
			return nil, fmt.Errorf("auth.issuers: %w", err)
		}
		o.Issuers = append(o.Issuers, next)
	}
	if k.verifier, err = transport.NewVerifier(o); err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	return k, nil
}

// keyFiles lists the files with the public keys.
func (a *Auth) keyFiles() []string {
	var list []string
	if a.PublicKeyFile != "" {
		list = append(list, a.PublicKeyFile)
	}
	for _, s := range a.Issuers {
		if i, err := parseIssuer(s); err == nil && i.keyFile != "" {
			list = append(list, i.keyFile)
		}
	}
	return list
}

// keysPatience is how long the start, and a reload, waits for the issuers' keys.
const keysPatience = 10 * time.Second

// startKeys reads the issuers' keys and follows them. An issuer that is away for long does not hold up the
// start: its tokens are refused until its keys have come, and so long the gateway is not ready.
func (e *Engine) startKeys(ctx context.Context) error {
	for id, set := range e.keys.sets {
		if err := e.metrics.Register(set); err != nil {
			return fmt.Errorf("register the metrics of a JWK set: %w", err)
		}
		e.followKeys(id, set)
	}
	e.noteKeys()
	select {
	case <-e.keysKnown:
	case <-time.After(keysPatience):
		e.log.Warn().Msg("not every JWK set has come, going on without")
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// followKeys reads a key set until it has come, and then again and again.
func (e *Engine) followKeys(id keySetID, set *transport.KeySet) {
	e.keyTasks[id] = e.goTask("jwks", func(ctx context.Context) error {
		if !set.Known() {
			if err := e.await(ctx, needKeys, set.Read); err != nil {
				return err
			}
			e.noteKeys()
		}
		return set.Run(ctx)
	})
}

// noteKeys finds out whether every key set in use has come.
func (e *Engine) noteKeys() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, set := range e.keys.sets {
		if !set.Known() {
			return
		}
	}
	e.ready.Met(needKeys)
	e.keysOnce.Do(func() { close(e.keysKnown) })
}

// prepareKeys makes the check of tokens by a new configuration and reads the key sets that it did not know.
func (e *Engine) prepareKeys(ctx context.Context, a Auth, files files) (*tokenKeys, error) {
	k, err := newTokenKeys(a, files, e.denials, e.keys.sets, e.log)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, keysPatience)
	defer cancel()
	var reading errgroup.Group
	for id, set := range k.sets {
		if e.keys.sets[id] == nil {
			reading.Go(func() error { return set.Read(ctx) })
		}
	}
	if err := reading.Wait(); err != nil {
		return nil, fmt.Errorf("auth: %w; SIGHUP tries again", err)
	}
	return k, nil
}

// useKeys makes tokens be checked by other keys; under e.mu.
func (e *Engine) useKeys(k *tokenKeys) {
	for id, set := range e.keys.sets {
		if k.sets[id] == nil {
			e.keyTasks[id].cancel()
			delete(e.keyTasks, id)
			e.metrics.Unregister(set)
		}
	}
	for id, set := range k.sets {
		if e.keys.sets[id] == nil {
			// It cannot fail: what had its labels, an issuer and a URL without its query, is gone.
			e.metrics.MustRegister(set)
			e.followKeys(id, set)
		}
	}
	e.keys = k
	e.verifier.Store(k.verifier)
}
