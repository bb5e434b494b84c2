package engine

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/structs"
	"github.com/knadh/koanf/v2"
	"github.com/rs/zerolog"
)

const (
	redacted      = "(redacted)"
	sourceDefault = "default"

	// maxConfigFile is the largest configuration file, in bytes, and maxSecretFile the largest file that
	// a secret or a public key is read from.
	maxConfigFile = 1 << 20
	maxSecretFile = 64 << 10
)

// Sources are the places that a configuration is read from, the later ones stronger.
type Sources struct {
	File    string            // path of a YAML file; empty: none
	Environ []string          // as os.Environ gives it; only names that begin with IM_ are read
	Flags   map[string]string // by key
}

// Loaded is a configuration and where each of its values comes from.
type Loaded struct {
	Config Config
	from   *Sources          // nil: it cannot be loaded again
	source map[string]string // by key
	files  files
}

// Fixed is a configuration that comes from nowhere, and so cannot be loaded again.
func Fixed(c Config) *Loaded { return &Loaded{Config: c, files: files{}} }

// Load reads, merges and validates a configuration. The error may be a *ConfigError, which lists every
// problem at once.
func Load(from Sources) (*Loaded, error) {
	loaded := &Loaded{from: &from, files: files{}}
	if err := loaded.load(); err != nil {
		return nil, err
	}
	return loaded, nil
}

// LoadPart is Load for a command that uses only the keys given, or what stands below them: what is wrong
// with others, or missing, does not matter to it.
func LoadPart(from Sources, keys ...string) (*Config, error) {
	l := &loader{options: options(), source: map[string]string{}, secrets: map[string]secretFile{}}
	if err := l.load(from.File, from.Environ, from.Flags); err != nil {
		return nil, err
	}
	c := &Config{}
	if err := l.k.Unmarshal("", c); err != nil {
		return nil, fmt.Errorf("decode the merged configuration: %w", err)
	}
	l.validate(c)
	problems := slices.DeleteFunc(l.problems, func(p Problem) bool {
		return !slices.ContainsFunc(append(keys, "-config"), func(k string) bool {
			return p.Key == k || p.Key == k+"_file" || strings.HasPrefix(p.Key, k+".")
		})
	})
	if len(problems) > 0 {
		return nil, &ConfigError{Problems: problems}
	}
	return c, nil
}

// again loads from where l came. The result holds at least the files that were read, also when there is
// an error.
func (l *Loaded) again() (*Loaded, error) {
	next := &Loaded{from: l.from, files: files{}}
	for path, f := range l.files {
		if f.once { // a pipe has nothing more to give, or never
			return next, &ConfigError{Problems: []Problem{{
				Key: strconv.Quote(path), Message: "cannot be read again: it is no regular file",
			}}}
		}
	}
	return next, next.load()
}

func (l *Loaded) load() error {
	ld := &loader{options: options(), source: map[string]string{}, secrets: map[string]secretFile{}, files: l.files}
	if err := ld.load(l.from.File, l.from.Environ, l.from.Flags); err != nil {
		return err
	}
	if ld.unread { // what it says is missing from everything below
		return &ConfigError{Problems: ld.problems}
	}
	l.source = ld.source
	if err := ld.k.Unmarshal("", &l.Config); err != nil {
		return fmt.Errorf("decode the merged configuration: %w", err)
	}
	for _, path := range l.Config.Auth.keyFiles() {
		_, _ = l.files.read(path, maxSecretFile) // whether it can be read, validate finds out
	}
	ld.validate(&l.Config)
	ld.validateKeys(&l.Config)
	if len(ld.problems) > 0 {
		return &ConfigError{Problems: ld.problems}
	}
	return nil
}

// files are those that a configuration was read from, by path: itself, secrets, public keys.
type files map[string]fileRead

// fileRead is what a file held, or why it could not be read.
type fileRead struct {
	text []byte
	err  error
	most int64
	once bool // it is no regular file
}

// read reads a file of so many bytes at most, and remembers what it held.
func (f files) read(path string, most int64) ([]byte, error) {
	r := readFile(path, most)
	if f != nil {
		f[path] = r
	}
	return r.text, r.err
}

// text is what a file holds: as it was read before, if it was.
func (f files) text(path string) ([]byte, error) {
	if r, ok := f[path]; ok {
		return r.text, r.err
	}
	return f.read(path, maxSecretFile)
}

func readFile(path string, most int64) (r fileRead) {
	r.most = most
	file, err := os.Open(path) // #nosec G304 -- named by the operator
	if err != nil {
		r.err = err
		return r
	}
	defer func() { _ = file.Close() }() // it was only read
	info, err := file.Stat()
	if err != nil {
		r.err = err
		return r
	}
	r.once = !info.Mode().IsRegular() && !info.IsDir()
	if r.text, r.err = io.ReadAll(io.LimitReader(file, most+1)); int64(len(r.text)) > most {
		r.text, r.err = nil, errTooLarge
	}
	return r
}

var errTooLarge = errors.New("the file is too large")

// same tells whether both held the same, or could not be read for the same reason.
func (f fileRead) same(g fileRead) bool {
	if f.err != nil || g.err != nil {
		return f.err != nil && g.err != nil && f.err.Error() == g.err.Error()
	}
	return bytes.Equal(f.text, g.text)
}

// loader gathers the layers of one Load.
type loader struct {
	options  []option
	k        *koanf.Koanf
	source   map[string]string // by key: where the value in k comes from
	secrets  map[string]secretFile
	files    files
	problems []Problem
	unread   bool // the file could not be read
}

// secretFile is a file that a secret is to be read from.
type secretFile struct{ path, source string }

// load merges the layers, weakest first; what is wrong with them is gathered in l.problems.
func (l *loader) load(file string, environ []string, flags map[string]string) error {
	l.k = koanf.New(".")
	if err := l.k.Load(structs.Provider(Default(), "koanf"), nil); err != nil {
		return fmt.Errorf("load the default configuration: %w", err)
	}
	for _, o := range l.options {
		l.source[o.key] = sourceDefault
	}
	l.file(file)
	l.environ(environ)
	l.flags(flags)
	l.readSecrets()
	return nil
}

func (l *loader) problem(key, value, source, message string) {
	l.problems = append(l.problems, Problem{Key: key, Value: value, Source: source, Message: message})
}

// find returns the option of a key; isFile when the key names the file of a secret.
func (l *loader) find(key string) (o *option, isFile bool) {
	for i := range l.options {
		o := &l.options[i]
		if o.key == key {
			return o, false
		}
		if o.secret && o.fileKey() == key {
			return o, true
		}
	}
	return nil, false
}

// set puts one raw value into the merged configuration, or notes what is wrong with it.
func (l *loader) set(o *option, isFile bool, raw any, source string) {
	if isFile {
		path, ok := raw.(string)
		if !ok {
			l.problem(o.fileKey(), fmt.Sprint(raw), source, "must be the path of a file")
			return
		}
		l.secrets[o.key] = secretFile{path, source}
		return
	}
	v, ok := o.parse(raw)
	if !ok {
		l.problem(o.key, o.shownRaw(raw), source, "must be "+o.wants())
		return
	}
	if err := l.k.Load(confmap.Provider(map[string]any{o.key: v}, "."), nil); err != nil {
		l.problem(o.key, o.shownRaw(raw), source, err.Error())
		return
	}
	l.source[o.key] = source
}

// shownRaw is a value of the wrong type for a person to read.
func (o *option) shownRaw(raw any) string {
	if o.secret {
		return redacted
	}
	if s, ok := raw.(string); ok {
		return strconv.Quote(s)
	}
	return fmt.Sprint(raw)
}

func (l *loader) file(path string) {
	if path == "" {
		return
	}
	source := "file " + path
	k := koanf.New(".")
	text, err := l.files.read(path, maxConfigFile)
	if err == nil {
		err = k.Load(given(text), yaml.Parser())
	}
	if err != nil {
		l.problem("-config", strconv.Quote(path), "", fileProblem(err))
		l.unread = true
		return
	}
	keys := k.Keys()
	slices.SortStableFunc(keys, func(a, b string) int { return cmp.Compare(l.rank(a), l.rank(b)) })
	for _, key := range keys {
		// All rather than Get: a key may be written with dots, on one line.
		raw := k.All()[key]
		o, isFile := l.find(key)
		switch {
		case o != nil && raw == nil: // written without a value: as if it were not there
		case o != nil:
			l.set(o, isFile, raw, source)
		case l.isSection(key) && raw == nil:
		case l.isSection(key):
			l.problem(key, "", source, "must hold keys, such as "+l.example(key))
		default:
			l.problem(key, "", source, l.unknown("key", key, l.keys()))
		}
	}
}

// given is a koanf.Provider of a file's text.
type given []byte

// ReadBytes implements koanf.Provider.
func (g given) ReadBytes() ([]byte, error) { return g, nil }

// Read implements koanf.Provider.
func (given) Read() (map[string]any, error) { return nil, errors.New("it is text, to be parsed") }

// rank orders keys as the struct does, unknown ones last.
func (l *loader) rank(key string) int {
	for i := range l.options {
		if o := &l.options[i]; o.key == key || o.secret && o.fileKey() == key {
			return i
		}
	}
	return len(l.options)
}

func fileProblem(err error) string {
	var path *os.PathError
	switch {
	case errors.As(err, &path):
		return "cannot be read: " + path.Err.Error()
	case errors.Is(err, errTooLarge):
		return fmt.Sprintf("must be a file of at most %d bytes", maxConfigFile)
	}
	return "is not valid YAML: " + quotedValue.ReplaceAllString(strings.TrimPrefix(err.Error(), "yaml: "), "${1}"+redacted)
}

// quotedValue matches where a complaint of the YAML parser quotes a value, which may be a secret.
var quotedValue = regexp.MustCompile("(?s)(anchor )'.*'|`.*`")

func (l *loader) isSection(key string) bool { return l.example(key) != "" }

func (l *loader) example(section string) string {
	for _, o := range l.options {
		if strings.HasPrefix(o.key, section+".") {
			return o.key
		}
	}
	return ""
}

func (l *loader) keys() []string {
	var list []string
	for _, o := range l.options {
		list = append(list, o.key)
		if o.secret {
			list = append(list, o.fileKey())
		}
	}
	return list
}

// orchestrated matches the variables that Kubernetes and container links set for a service whose
// name begins with im-, such as IM_LOGIC_SERVICE_HOST. They are not ours and are ignored.
var orchestrated = regexp.MustCompile(
	`^IM_[A-Z0-9_]*?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$`)

func (l *loader) environ(environ []string) {
	byName := map[string]string{}
	var names []string
	for _, key := range l.keys() {
		byName[envName(key)] = key
		names = append(names, envName(key))
	}
	environ = slices.Clone(environ)
	slices.Sort(environ)
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) {
			continue
		}
		if key, known := byName[name]; known {
			o, isFile := l.find(key)
			l.set(o, isFile, value, "environment "+name)
		} else if !orchestrated.MatchString(name) {
			l.problem(name, "", "environment", l.unknown("variable", name, names))
		}
	}
}

func (l *loader) flags(flags map[string]string) {
	for _, key := range l.keys() {
		if value, given := flags[key]; given {
			o, isFile := l.find(key)
			l.set(o, isFile, value, "flag -"+key)
		}
	}
}

// readSecrets reads the secrets that are kept in files.
func (l *loader) readSecrets() {
	for i := range l.options {
		o := &l.options[i]
		from, given := l.secrets[o.key]
		if !given || from.path == "" {
			continue
		}
		if l.source[o.key] != sourceDefault && l.k.String(o.key) != "" {
			l.problem(o.fileKey(), strconv.Quote(from.path), from.source,
				"must not be given together with "+o.key+" ("+l.source[o.key]+")")
			continue
		}
		secret, err := l.readSecret(from.path)
		if err != nil {
			l.problem(o.fileKey(), strconv.Quote(from.path), from.source, err.Error())
			continue
		}
		l.set(o, false, secret, fmt.Sprintf("file %s, named by %s", from.path, from.source))
	}
}

func (l *loader) readSecret(path string) (string, error) {
	b, err := l.files.read(path, maxSecretFile)
	var unread *os.PathError
	switch {
	case errors.Is(err, errTooLarge):
		return "", fmt.Errorf("must be a file of at most %d bytes", maxSecretFile)
	case errors.As(err, &unread):
		return "", errors.New("must be a file that can be read: " + unread.Err.Error())
	case err != nil:
		return "", errors.New("must be a file that can be read: " + err.Error())
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" {
		return "", errors.New("must be a file that is not empty")
	}
	return secret, nil
}

// validate adds the problems of the merged values, but for those keys whose value was refused
// already: what they hold now is not what was meant.
func (l *loader) validate(c *Config) {
	refused := map[string]bool{}
	for _, p := range l.problems {
		refused[p.Key] = true
		refused[strings.TrimSuffix(p.Key, "_file")] = true
	}
	for _, p := range c.problems() {
		if !refused[p.Key] {
			p.Source = l.source[p.Key]
			l.problems = append(l.problems, p)
		}
	}
}

// validateKeys looks into the files with public keys, unless something else is wrong with auth.
func (l *loader) validateKeys(c *Config) {
	if slices.ContainsFunc(l.problems, func(p Problem) bool { return strings.HasPrefix(p.Key, "auth.") }) {
		return
	}
	own, key := c.Auth, "auth.public_key_file"
	own.Issuers = nil
	_, err := newTokenKeys(own, l.files, nil, nil, zerolog.Nop())
	if err == nil {
		key = "auth.issuers"
		_, err = newTokenKeys(c.Auth, l.files, nil, nil, zerolog.Nop())
	}
	if err != nil {
		l.problems = append(l.problems, Problem{Key: key, Source: l.source[key], Value: c.shown(key), Message: "does not work: " + err.Error()})
	}
}

// unknown says that a name is not known and which one may have been meant.
func (l *loader) unknown(what, name string, known []string) string {
	best, distance := "", len(name)/3+1
	for _, k := range known {
		if d := editDistance(name, k); d < distance {
			best, distance = k, d
		}
	}
	if best == "" {
		return "unknown " + what
	}
	return "unknown " + what + "; did you mean " + best + "?"
}

// editDistance counts the insertions, deletions and replacements of bytes that turn a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := diagonal
			if a[i] != b[j] {
				d = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], d
		}
	}
	return row[len(b)]
}
