package engine

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// envPrefix begins the name of every environment variable that is read.
const envPrefix = "IM_"

// option is one key of the configuration, as the tags of its field describe it.
type option struct {
	key      string // dotted
	env      string // environment variable
	index    []int  // of the field in Config
	kind     reflect.Type
	typeName string // Go type that declares the field; with field it finds the comment
	field    string
	section  string // Go type of the section, the first part of the key; empty without one
	unit     string
	bounds   string // "min..max"
	oneOf    []string
	check    string // a key of checks
	secret   bool
	required bool
	reload   bool // the running gateway takes a new value
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	listType     = reflect.TypeFor[[]string]()
)

// options lists every key in the order of the struct.
func options() []option { return appendOptions(nil, reflect.TypeFor[Config](), option{}) }

// appendOptions appends the options of t, which outer leads to.
func appendOptions(list []option, t reflect.Type, outer option) []option {
	for f := range t.Fields() {
		key := outer.key + f.Tag.Get("koanf")
		at := append(slices.Clone(outer.index), f.Index...)
		if f.Type.Kind() == reflect.Struct {
			inner := option{key: key + ".", index: at, section: cmp.Or(outer.section, f.Type.Name())}
			list = appendOptions(list, f.Type, inner)
			continue
		}
		o := option{
			key:      key,
			env:      envName(key),
			index:    at,
			kind:     f.Type,
			typeName: t.Name(),
			field:    f.Name,
			section:  outer.section,
			unit:     f.Tag.Get("unit"),
			bounds:   f.Tag.Get("range"),
			check:    f.Tag.Get("check"),
			secret:   f.Tag.Get("secret") == "true",
			required: f.Tag.Get("required") == "true",
			reload:   f.Tag.Get("reload") == "true",
		}
		if v := f.Tag.Get("oneof"); v != "" {
			o.oneOf = strings.Split(v, "|")
		}
		list = append(list, o)
	}
	return list
}

func envName(key string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// fileKey is the key that names a file to read a secret from.
func (o *option) fileKey() string { return o.key + "_file" }

// value is the option's value in c.
func (o *option) value(c *Config) reflect.Value {
	return reflect.ValueOf(c).Elem().FieldByIndex(o.index)
}

// wants says in words what values the option takes.
func (o *option) wants() string {
	var s string
	switch {
	case len(o.oneOf) > 0:
		s = oneOfText(o.oneOf)
	case o.check != "" && o.kind == listType:
		s = "a list of " + checkText(o.check)
	case o.check != "":
		s = checkText(o.check)
	case o.kind == durationType:
		s = "a duration with its unit (such as 30s)"
	case o.kind == listType:
		s = "a list"
	case o.unit == "bytes":
		s = "a number of bytes (such as 65536 or 64KiB)"
	case o.kind.Kind() == reflect.Int:
		s = "a whole number"
	case o.kind.Kind() == reflect.Float64:
		s = "a number"
	case o.kind.Kind() == reflect.Bool:
		s = "true or false"
	default:
		s = "text"
	}
	if o.bounds != "" {
		lo, hi, _ := strings.Cut(o.bounds, "..")
		s += " from " + lo + " to " + hi
	}
	return s
}

func oneOfText(values []string) string {
	if len(values) == 1 {
		return values[0]
	}
	last := len(values) - 1
	return strings.Join(values[:last], ", ") + " or " + values[last]
}

// parse turns a raw value, text from the environment or a flag or what YAML made of the file,
// into one of the option's type. ok is false when it has another type.
func (o *option) parse(raw any) (v any, ok bool) {
	switch {
	case o.kind == listType:
		return parseList(raw)
	case o.kind == durationType:
		return parseDuration(raw)
	case o.kind.Kind() == reflect.Int:
		return parseInt(raw, o.unit == "bytes")
	case o.kind.Kind() == reflect.Float64:
		return parseFloat(raw)
	case o.kind.Kind() == reflect.Bool:
		return parseBool(raw)
	default:
		v, ok = raw.(string)
		return v, ok
	}
}

func parseList(raw any) (any, bool) {
	list := []string{}
	switch raw := raw.(type) {
	case string:
		for s := range strings.SplitSeq(raw, ",") {
			if s = strings.TrimSpace(s); s != "" {
				list = append(list, s)
			}
		}
	case []any:
		for _, e := range raw {
			s, ok := e.(string)
			if !ok {
				return nil, false
			}
			list = append(list, s)
		}
	default:
		return nil, false
	}
	return list, true
}

func parseDuration(raw any) (any, bool) {
	if raw == 0 {
		return time.Duration(0), true
	}
	s, ok := raw.(string)
	if !ok {
		return nil, false
	}
	d, err := time.ParseDuration(s)
	return d, err == nil
}

func parseBool(raw any) (any, bool) {
	switch raw {
	case true, "true":
		return true, true
	case false, "false":
		return false, true
	}
	return nil, false
}

func parseInt(raw any, bytes bool) (any, bool) {
	switch raw := raw.(type) {
	case int:
		return raw, true
	case string:
		unit := 1
		if bytes {
			raw, unit = cutByteUnit(raw)
		}
		n, err := strconv.Atoi(raw)
		if err != nil || n*unit/unit != n {
			return nil, false
		}
		return n * unit, true
	}
	return nil, false
}

func parseFloat(raw any) (any, bool) {
	switch raw := raw.(type) {
	case int:
		return float64(raw), true
	case float64:
		return raw, true
	case string:
		f, err := strconv.ParseFloat(raw, 64)
		return f, err == nil
	}
	return nil, false
}

// byteUnits are the suffixes of a number of bytes, largest first.
var byteUnits = [...]struct {
	suffix string
	size   int
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

func cutByteUnit(s string) (number string, unit int) {
	for _, u := range byteUnits {
		if n, found := strings.CutSuffix(s, u.suffix); found {
			return strings.TrimSpace(n), u.size
		}
	}
	return s, 1
}

// inRange reports whether v, of the option's type, lies within its bounds.
func (o *option) inRange(v any) bool {
	if o.bounds == "" {
		return true
	}
	lo, hi, _ := strings.Cut(o.bounds, "..")
	minimum, _ := o.parse(lo)
	maximum, _ := o.parse(hi)
	switch v := v.(type) {
	case int:
		return minimum.(int) <= v && v <= maximum.(int)
	case float64:
		return minimum.(float64) <= v && v <= maximum.(float64)
	case time.Duration:
		return minimum.(time.Duration) <= v && v <= maximum.(time.Duration)
	}
	return false
}

// text is v as it is written in a configuration file.
func (o *option) text(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case []string:
		return strings.Join(v, ",")
	case time.Duration:
		return durationText(v)
	case int:
		if o.unit != "bytes" || v == 0 {
			return strconv.Itoa(v)
		}
		for _, u := range byteUnits {
			if v%u.size == 0 {
				return strconv.Itoa(v/u.size) + u.suffix
			}
		}
	}
	return fmt.Sprint(v)
}

// durationText is d without the zero minutes and seconds of Duration.String.
func durationText(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
