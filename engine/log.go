package engine

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
)

// always begins a line of what somebody has done to the gateway. It is written whatever the level: who
// looks for the cause later must find it.
func always(l zerolog.Logger) *zerolog.Event {
	return l.Log().Str(zerolog.LevelFieldName, zerolog.LevelInfoValue)
}

// NewLogger returns the logger that cfg asks for, and sets the LogLevel. Times are UTC with milliseconds.
func NewLogger(w io.Writer, cfg Log) (zerolog.Logger, error) {
	if err := (LogLevel{}).Set(cfg.Level); err != nil {
		return zerolog.Nop(), fmt.Errorf("log.level: %w", err)
	}
	if cfg.Format == "console" || cfg.Format == "auto" && terminal(w) {
		w = zerolog.ConsoleWriter{Out: w, TimeFormat: "15:04:05.000", NoColor: !terminal(w)}
	}
	return zerolog.New(w).Hook(stamp{}), nil
}

// LogLevel is the least severe level that this process logs, which can be changed while it runs. It is
// zerolog's global level, whatever logger is asked: loggers are values that every part has copied, and
// that is the one variable at which all of them look, with an atomic load. Any goroutine may use it.
type LogLevel struct{}

// Set changes the level to trace, debug, info, warn or error.
func (LogLevel) Set(name string) error {
	level, err := zerolog.ParseLevel(name)
	if err != nil || level.String() != name || level > zerolog.ErrorLevel {
		return fmt.Errorf("%q is no level: it must be trace, debug, info, warn or error", name)
	}
	zerolog.SetGlobalLevel(level)
	return nil
}

// String is the level in use.
func (LogLevel) String() string { return zerolog.GlobalLevel().String() }

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

// stamp adds the time with milliseconds, which zerolog offers only by a package variable.
type stamp struct{}

// Run implements zerolog.Hook.
func (stamp) Run(e *zerolog.Event, _ zerolog.Level, _ string) {
	e.Str(zerolog.TimestampFieldName, time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
}
