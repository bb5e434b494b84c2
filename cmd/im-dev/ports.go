package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
)

// portError says that an address is taken and which flag changes it.
type portError struct {
	what, addr, flag string
	err              error
}

func (e *portError) Error() string {
	return fmt.Sprintf("%s cannot listen on %s: %v\nChoose another port with %s, or end the program that has this one.",
		e.what, e.addr, e.err, e.flag)
}

func (e *portError) Unwrap() error { return e.err }

// choose checks that addr is free before anything is started, and returns it with port 0 replaced
// by a free port.
func choose(what, addr, flag string) (string, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		if op := (*net.OpError)(nil); errors.As(err, &op) {
			err = op.Err
		}
		return "", &portError{what, addr, flag, err}
	}
	if err := ln.Close(); err != nil {
		return "", fmt.Errorf("close the listener that tried %s: %w", addr, err)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", fmt.Errorf("address of %s: %w", what, err)
	}
	if port == "0" {
		port = strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
	}
	return net.JoinHostPort(host, port), nil
}
