package engine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The collector's room. A percentage of the live heap (GOGC) gives an idle node with many
// sessions far more than it needs, and a busy one with few of them far too little. So the room is
// bytes, and grows only while collections come fast; when they have ceased it is given back.
const (
	gcRoomMin  = 6 << 20
	gcRoomLive = 1                      // most, as a multiple of the live heap
	gcFast     = 80 * time.Millisecond  // between collections: the room doubles
	gcSlow     = 200 * time.Millisecond // the room halves
	gcQuiet    = 2 * time.Second        // without any: one more, which gives the room back
)

// gcPacer sets GOGC after each collection so that the next one comes when the heap has grown by
// the room. GOMEMLIMIT counts as always.
type gcPacer struct {
	stopped atomic.Bool
	quiet   *time.Timer // calm, gcQuiet after a collection that left more than the least room
	settled atomic.Bool // the collection under way is calm's

	// Owned by collected.
	room   int64
	last   time.Time
	sample []metrics.Sample
}

// PaceGC starts the pacer of this process, for a command to call once, unless the operator has set GOGC. The function returned stops it and
// gives GOGC back.
func PaceGC() (stop func()) {
	if _, set := os.LookupEnv("GOGC"); set {
		return func() {}
	}
	before := debug.SetGCPercent(100)
	p := newGCPacer()
	runtime.GC()
	return func() {
		p.stop()
		debug.SetGCPercent(before)
	}
}

func newGCPacer() *gcPacer {
	p := &gcPacer{room: gcRoomMin, last: time.Now(), sample: newGCSample()}
	p.quiet = time.AfterFunc(time.Hour, p.calm)
	p.quiet.Stop()
	p.arm()
	return p
}

func (p *gcPacer) stop() {
	p.stopped.Store(true)
	p.quiet.Stop()
}

// calm collects once more: a storm that is over has left a goal that an idle process would not reach for
// minutes, and the pages below it are kept.
func (p *gcPacer) calm() {
	if !p.stopped.Load() {
		p.settled.Store(true)
		runtime.GC()
	}
}

func newGCSample() []metrics.Sample { return []metrics.Sample{{Name: "/gc/heap/live:bytes"}} }

// sentinel dies in every collection.
type sentinel struct{ p *gcPacer }

func (p *gcPacer) arm() {
	runtime.SetFinalizer(&sentinel{p}, func(s *sentinel) { s.p.collected(time.Now()) })
}

// collected runs on the runtime's finalizer goroutine after each collection.
func (p *gcPacer) collected(now time.Time) {
	if p.stopped.Load() {
		return
	}
	metrics.Read(p.sample)
	live := int64(p.sample[0].Value.Uint64())
	p.room = gcRoom(p.room, live, now.Sub(p.last))
	if p.settled.Swap(false) {
		p.room = gcRoomMin
	}
	p.last = now
	debug.SetGCPercent(gcPercent(p.room, live))
	if p.room > gcRoomMin {
		p.quiet.Reset(gcQuiet)
	} else {
		p.quiet.Stop()
	}
	p.arm()
}

// gcRoom is the next room, since collections are so far apart.
func gcRoom(room, live int64, apart time.Duration) int64 {
	switch {
	case apart < gcFast:
		room *= 2
	case apart > gcSlow:
		room /= 2
	}
	return max(gcRoomMin, min(room, gcRoomLive*live))
}

func gcPercent(room, live int64) int {
	return int(max(5, min(room*100/max(live, 1), 1000)))
}

// trimStart gives back the pages of the program's file that only starting has touched: some
// 20 MiB of code and tables. Those in use come back at the next touch, from the page cache.
func trimStart() error {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("read own mappings: %w", err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("find own file: %w", err)
	}
	debug.FreeOSMemory()
	for line := range strings.SplitSeq(string(maps), "\n") {
		// 00400000-013c8000 r-xp 00000000 fe:00 9986112   /path
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != exe || (f[1] != "r-xp" && f[1] != "r--p") {
			continue // what can be written holds data
		}
		lo, hi, _ := strings.Cut(f[0], "-")
		from, err1 := strconv.ParseUint(lo, 16, 64)
		to, err2 := strconv.ParseUint(hi, 16, 64)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("read own mappings: %w", err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(from), uintptr(to-from), unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("release the pages of %s: %w", exe, errno)
		}
	}
	return nil
}
