package engine

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/providers/structs"
	"github.com/knadh/koanf/v2"
)

const (
	redacted      = "(redacted)"
	sourceDefault = "default"

	// maxSecretFile is the largest file, in bytes, that a secret is read from.
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
	source map[string]string // by key
}

// Load reads, merges and validates a configuration. On a *ConfigError, which lists every problem
// at once, the rest of the result must not be used.
func Load(from Sources) (*Loaded, error) {
	l := &loader{options: options(), source: map[string]string{}, secrets: map[string]secretFile{}}
	if err := l.load(from.File, from.Environ, from.Flags); err != nil {
		return nil, err
	}
	if l.unread { // what it says is missing from everything below
		return nil, &ConfigError{Problems: l.problems}
	}

	loaded := &Loaded{source: l.source}
	if err := l.k.Unmarshal("", &loaded.Config); err != nil {
		return nil, fmt.Errorf("decode the merged configuration: %w", err)
	}
	l.validate(&loaded.Config)
	if len(l.problems) > 0 {
		return nil, &ConfigError{Problems: l.problems}
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

// loader gathers the layers of one Load.
type loader struct {
	options  []option
	k        *koanf.Koanf
	source   map[string]string // by key: where the value in k comes from
	secrets  map[string]secretFile
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
	if err := k.Load(file.Provider(path), yaml.Parser()); err != nil {
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
	if errors.As(err, &path) {
		return "cannot be read: " + path.Err.Error()
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
		secret, err := readSecret(from.path)
		if err != nil {
			l.problem(o.fileKey(), strconv.Quote(from.path), from.source, err.Error())
			continue
		}
		l.set(o, false, secret, fmt.Sprintf("file %s, named by %s", from.path, from.source))
	}
}

func readSecret(path string) (string, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxSecretFile {
		return "", fmt.Errorf("must be a file of at most %d bytes", maxSecretFile)
	}
	b, err := os.ReadFile(path) // #nosec G304 -- named by the operator
	if err != nil {
		return "", errors.New("must be a file that can be read: " + errors.Unwrap(err).Error())
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
