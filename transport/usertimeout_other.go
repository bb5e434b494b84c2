//go:build !linux

package transport

import "time"

// setUserTimeout does nothing: the kernel gives up a dead peer when it does, after minutes.
func setUserTimeout(int, time.Duration) error { return nil }
