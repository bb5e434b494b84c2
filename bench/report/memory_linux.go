package report

import "golang.org/x/sys/unix"

// memory is the machine's memory in bytes, 0 when the kernel does not tell.
func memory() int64 {
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) != nil {
		return 0
	}
	return int64(s.Totalram) * int64(s.Unit)
}
