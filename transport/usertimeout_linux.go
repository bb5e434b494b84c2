package transport

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// setUserTimeout lets the kernel end a connection whose peer has not acknowledged what was sent for so long
// (tcp(7), TCP_USER_TIMEOUT).
func setUserTimeout(fd int, d time.Duration) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds())))
}
