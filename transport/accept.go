package transport

import (
	"sync"
	"time"

	gneterrors "github.com/panjf2000/gnet/v2/pkg/errors"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// When accept fails (EMFILE, ENFILE, ENOMEM, ...), gnet's poller holds the error against
// ErrAcceptSocket by errors.Is, and ends the engine with all its connections where that is it. This
// error is not: it cannot be compared, and denies it when asked. So the loop goes on; and being
// asked tells us of the failure. TestAcceptSurvivesNoDescriptors fails where a gnet of another
// version does otherwise.
func init() { gneterrors.ErrAcceptSocket = acceptFailure{} }

type acceptFailure struct{ _ [0]func() } // functions cannot be compared

func (acceptFailure) Error() string { return "accept a connection" }

// Is is called by gnet's poller on the loop whose accept has failed.
func (acceptFailure) Is(target error) bool {
	if _, asked := target.(acceptFailure); asked {
		acceptFailures.Inc()
		spare.release()
	}
	return false
}

// acceptFailures is the process's, as its descriptors are: gnet does not say which engine asks.
var acceptFailures = prometheus.NewCounter(prometheus.CounterOpts{
	Name: "im_gateway_transport_accept_failures_total",
	Help: "Connections that could not be accepted for want of descriptors or memory.",
})

// spare is a descriptor kept for the time when there is none left: given up, it lets the next accept
// succeed, whose connection is closed at once. Without it the kernel would report the same connection
// again and again.
var spare spareFile

type spareFile struct {
	mu    sync.Mutex
	inUse int // servers
	fd    int
	held  bool
}

// acquire keeps a spare descriptor until release or retire; once for every server.
func (s *spareFile) acquire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inUse++
	s.open()
}

func (s *spareFile) open() {
	if s.held || s.inUse == 0 {
		return
	}
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	s.fd, s.held = fd, err == nil // without one: tried again by the next tick
}

// release gives the descriptor up. When it is gone already, others need more than there is: the loop
// waits for a moment rather than spin.
func (s *spareFile) release() {
	s.mu.Lock()
	held := s.held
	s.close()
	s.mu.Unlock()
	if !held {
		time.Sleep(time.Millisecond)
	}
}

func (s *spareFile) close() {
	if s.held {
		_ = unix.Close(s.fd) // nothing was written to it
		s.held = false
	}
}

// ready tells whether the spare is there, and takes one again where it is not.
func (s *spareFile) ready() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.held
	s.open()
	return was
}

// retire ends what acquire began.
func (s *spareFile) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inUse--; s.inUse == 0 {
		s.close()
	}
}
