package transport

import (
	"context"
	"time"

	"im-gateway/codec"
)

// maxKeptScratch keeps a loop from holding the memory of its largest burst.
const maxKeptScratch = 1 << 20

// egressTask runs the one batch that a shard may have under way at a loop.
type egressTask struct {
	l     *loop
	batch *codec.EgressBatch
}

// Run implements gnet.Runnable; on the loop.
func (t *egressTask) Run(context.Context) error {
	b := t.batch
	t.batch = nil
	t.l.begin()
	t.l.guard(nil, func() { t.l.run(b) })
	b.Written = time.Now().UnixNano()
	t.l.s.opts.Sink.Return(b)
	return nil
}

// submit hands a batch to the loop. A batch that no loop will run comes back at once, all gone.
func (l *loop) submit(b *codec.EgressBatch) {
	t := &l.shards[b.Shard].egress
	t.batch = b
	if l.trigger(t) {
		return
	}
	t.batch = nil
	for i := range b.Commands {
		b.Commands[i].Outcome = codec.OutcomeGone
	}
	l.s.opts.Sink.Return(b)
}

// run does what a batch commands: the commands are gathered by connection, each of which is written
// to once.
func (l *loop) run(b *codec.EgressBatch) {
	cmds := b.Commands
	if l.deflater != nil {
		l.deflater.begin()
	}
	if cap(l.next) < len(cmds) {
		l.next = make([]int32, len(cmds)+len(cmds)/2)
	}
	next := l.next[:len(cmds)]
	for i := range cmds {
		c := &cmds[i]
		c.Outcome = codec.OutcomeGone
		cn := l.lookup(c.Session)
		if cn == nil || cn.state != stateOpen {
			continue
		}
		next[i] = -1
		if cn.head < 0 {
			cn.head = int32(i)
			l.touched = append(l.touched, cn)
		} else {
			next[cn.last] = int32(i)
		}
		cn.last = int32(i)
	}
	for i, cn := range l.touched {
		head := cn.head
		cn.head = -1
		l.touched[i] = nil
		if cn.state == stateOpen {
			l.guard(cn, func() { l.serve(cn, cmds, next, head) })
		}
	}
	l.touched = l.touched[:0]
}

// serve does the commands for one connection.
func (l *loop) serve(cn *conn, cmds []codec.Command, next []int32, head int32) {
	out := l.scratch[:0]
	start := cn.written
	closeAt := int32(-1)
	for i := head; i >= 0 && closeAt < 0; i = next[i] {
		c := &cmds[i]
		switch c.Kind {
		case codec.CommandFrame:
			out = cn.appendMessage(out, cn.op(), c.Payload)
			c.Position = start + uint64(len(out))
			l.counts.send(c.Content, len(c.Payload))
		case codec.CommandPing:
			var late bool
			if out, late = cn.ping(out); late {
				cmds[i].Code, cmds[i].Reason = codec.CloseHeartbeatMissed, reasonSilent
				closeAt = i
			}
		case codec.CommandClose:
			closeAt = i
		}
	}
	l.scratch = out
	if cap(l.scratch) > maxKeptScratch {
		l.scratch = nil
	}
	cn.write(out)
	l.outcomes(cn, cmds, next, head, closeAt)
	if closeAt >= 0 && cn.state == stateOpen {
		l.fail(cn, cmds[closeAt].Code, cmds[closeAt].Reason)
	}
}

// outcomes says of each frame what became of it.
func (l *loop) outcomes(cn *conn, cmds []codec.Command, next []int32, head, closeAt int32) {
	if cn.state == stateClosed {
		return // gone, as they were marked
	}
	flushed := cn.flushed()
	for i := head; i >= 0 && i != closeAt; i = next[i] {
		c := &cmds[i]
		switch {
		case c.Kind != codec.CommandFrame:
		case c.Position <= flushed:
			c.Outcome = codec.OutcomeFlushed
		default: // even where the write made it a slow consumer: its close, under way, settles it
			c.Outcome = codec.OutcomeBuffered
		}
	}
}
