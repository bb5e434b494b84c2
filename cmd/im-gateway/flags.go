package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"im-gateway/engine"
)

// verb is what the command line asks for.
type verb int

const (
	verbRun verb = iota
	verbPrint
	verbCheck
	verbReference
	verbVersion
	verbHelp
)

// command is a parsed command line.
type command struct {
	verb  verb
	file  string
	flags map[string]string // keys of the configuration that were given as flags
}

// parse reads the command line; its errors fit on one line.
func parse(args []string) (command, error) {
	cmd := command{flags: map[string]string{}}
	if len(args) > 0 && args[0] == "config" {
		if len(args) == 1 {
			return cmd, errors.New("config what? print, check or reference")
		}
		switch args[1] {
		case "print":
			cmd.verb = verbPrint
		case "check":
			cmd.verb = verbCheck
		case "reference":
			cmd.verb = verbReference
		case "-h", "-help", "--help":
			cmd.verb = verbHelp
			return cmd, nil
		default:
			return cmd, fmt.Errorf("config %s: want print, check or reference", args[1])
		}
		args = args[2:]
	} else if len(args) > 0 && args[0] == "help" {
		cmd.verb = verbHelp
		return cmd, nil
	} else if len(args) > 0 && args[0] == "version" {
		cmd.verb = verbVersion
		return cmd, nil
	}
	set := flag.NewFlagSet("im-gateway", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.Usage = func() {}
	set.StringVar(&cmd.file, "config", "", "")
	version := set.Bool("version", false, "")
	secret := ""
	if err := addKeys(set, cmd.flags, &secret); err != nil {
		return cmd, err
	}
	err := set.Parse(args)
	switch {
	case secret != "": // flag's own error would repeat the value
		return cmd, fmt.Errorf("-%s: every user of this machine can read flags; use %s_file or the environment",
			secret, secret)
	case errors.Is(err, flag.ErrHelp):
		cmd.verb = verbHelp
		return cmd, nil
	case err != nil:
		return cmd, err
	case *version:
		cmd.verb = verbVersion
		return cmd, nil
	case set.NArg() > 0:
		return cmd, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	return cmd, nil
}

// errSecret ends the parsing at a flag that would carry a secret.
var errSecret = errors.New("a secret")

// addKeys makes every key of the configuration a flag; values are checked when it is loaded. The
// key of a secret that was given is put into secret.
func addKeys(set *flag.FlagSet, given map[string]string, secret *string) error {
	keys, err := engine.Keys()
	if err != nil {
		return err
	}
	for _, k := range keys {
		take := func(value string) error {
			given[k.Name] = value
			return nil
		}
		switch {
		case k.Secret:
			set.Func(k.Name, "", func(string) error {
				*secret = k.Name
				return errSecret
			})
		case k.Bool:
			set.BoolFunc(k.Name, "", take)
		default:
			set.Func(k.Name, "", take)
		}
	}
	return nil
}

const usageHead = `im-gateway connects clients by WebSocket and HTTP with im-logic, Kafka, Redis and etcd.

Usage:
  im-gateway [-config FILE] [flags]     run the gateway; logs go to standard error
  im-gateway config check [flags]       check the configuration: exit code 0 or 2
  im-gateway config print [flags]       show the effective configuration and where each value comes from
  im-gateway config reference           write the reference of all keys as Markdown
  im-gateway ctl COMMAND [flags]        look at a running gateway and act on it: im-gateway ctl -h
  im-gateway -version                   show version, commit, its date, and the Go version
  im-gateway -h

  -config FILE    YAML file to read the configuration from

Every key below can be given in the file, in the environment and as a flag; the later is stronger:
  file          log: {level: debug}     or on one line   log.level: debug
  environment   IM_LOG_LEVEL=debug      (upper case, dots become underscores)
  flag          -log.level=debug
Secrets are not taken from flags: use the environment, the file, or the key that ends in _file.
The first SIGTERM or SIGINT drains and stops, the second stops at once. SIGHUP loads the configuration
again, and so does a change of the file, or of a file with secrets or public keys: so the keys marked *
can change without a restart.
Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage or configuration.

Try it on this machine, with Kafka, Redis and etcd on their usual ports:
  IM_AUTH_HS256_SECRET=$(openssl rand -base64 32) im-gateway

Keys, with their defaults in brackets (docs/configuration.md says more about each):
`

// usage writes the help text: the commands, then every key with its first sentence and default.
func usage(w io.Writer) error {
	keys, err := engine.Keys()
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(usageHead)
	last := "-"
	for _, k := range keys {
		section, _, dotted := strings.Cut(k.Name, ".")
		if !dotted {
			section = ""
		}
		if section != last {
			b.WriteString("\n")
			last = section
		}
		text := k.Summary
		if k.Default != "" {
			text += " [" + k.Default + "]"
		}
		mark := ' '
		if k.Reload {
			mark = '*'
		}
		fmt.Fprintf(&b, "%c %-*s %s\n", mark, keyWidth, k.Name, wrap(text, textWidth, strings.Repeat(" ", keyWidth+3)))
	}
	_, err = io.WriteString(w, b.String())
	return err
}

// The columns of the list of keys.
const (
	keyWidth  = 30
	textWidth = 67
)

// wrap breaks text into lines of at most width, but for longer words; indent begins the second and
// later ones.
func wrap(text string, width int, indent string) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column == 0:
		case column+1+len(word) > width:
			b.WriteString("\n" + indent)
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
