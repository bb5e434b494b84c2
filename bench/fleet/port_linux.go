package fleet

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// latePort leaves the choice of the local port to connect(2), so that each pair of addresses has
// a range of ports of its own.
func latePort(_, _ string, rc syscall.RawConn) error {
	var err error
	if cerr := rc.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	}); cerr != nil {
		return cerr
	}
	return err
}
