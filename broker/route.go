package broker

import (
	"context"
	"slices"
	"time"

	"github.com/IBM/sarama"

	"im-gateway/codec"
)

const (
	// locateTimeout bounds one look-up of users that are not here.
	locateTimeout = 3 * time.Second
	// locateMax is how many of them are looked up together at most.
	locateMax = 4096
)

// Place is where a session of a user is.
type Place struct {
	GatewayID string
	DeviceID  string
	AnyDevice bool // not known
}

// Located is what is known of one user.
type Located struct {
	Places []Place // the newest session first
	Err    error   // not known
}

// route is a delivery for which sessions on other gateways are looked for: instead of one here, or, with
// besides, beside those here.
type route struct {
	codec.Delivery
	besides bool
	retried bool // the user was here by what Redis said, and was delivered to once more
	found   Located
}

// locate looks users up until the claim ends. It is a goroutine of the claim's.
func (k *claim) locate(ctx context.Context) {
	for {
		select {
		case routes := <-k.looking:
			users := make([]string, len(routes))
			for i := range routes {
				users[i] = routes[i].Record.Targets[routes[i].Target]
			}
			lookCtx, cancel := context.WithTimeout(ctx, locateTimeout)
			found := k.c.opts.Locate(lookCtx, users)
			cancel()
			for i := range routes {
				routes[i].found = found[i]
			}
			k.inbox.located(routes)
		case <-ctx.Done():
			return
		}
	}
}

// ask has a delivery's user looked up.
func (k *claim) ask(d codec.Delivery, besides bool) {
	k.asking = append(k.asking, route{Delivery: d, besides: besides, retried: k.retried[d]})
}

// takeAsking takes as many as are looked up together.
func (k *claim) takeAsking() []route { return k.asking[:min(len(k.asking), locateMax)] }

// routed decides about a delivery by where its user's sessions are.
func (k *claim) routed(r route) {
	d := r.Record
	delete(k.retried, r.Delivery)
	if r.found.Err != nil {
		k.c.metrics.lookupsFailed.Inc()
		if r.besides {
			k.opened(1)
		}
		k.backlog = append(k.backlog, k.undelivered(codec.Ended{Delivery: r.Delivery, End: codec.EndMoved}, ""))
		return
	}
	here := k.c.producer.opts.GatewayID
	var gateways []string
	back := false
	for _, p := range r.found.Places {
		switch {
		case d.DeviceID != "" && p.DeviceID != d.DeviceID && !p.AnyDevice:
		case p.GatewayID == here:
			back = true
		case !slices.Contains(gateways, p.GatewayID):
			gateways = append(gateways, p.GatewayID)
		}
	}
	switch {
	case len(gateways) == 0 && r.besides: // they have ended meanwhile
		k.settled(d)
		return
	case len(gateways) == 0 && back && !r.retried: // the user came while the shard said no
		k.retried[r.Delivery] = true
		k.again = append(k.again, r.Delivery)
		return
	case len(gateways) == 0:
		k.backlog = append(k.backlog, k.undelivered(codec.Ended{Delivery: r.Delivery, End: codec.EndOffline}, ""))
		return
	}
	more := len(gateways) - 1
	d.Pending += more
	if r.besides {
		more++
	}
	k.opened(more)
	for _, g := range gateways {
		if d.Forwarded || g == k.c.opts.GatewayID || !k.c.opts.Alive(g) {
			k.backlog = append(k.backlog, k.undelivered(codec.Ended{Delivery: r.Delivery, End: codec.EndMoved}, g))
			continue
		}
		k.backlog = append(k.backlog, k.forward(r.Delivery, g))
	}
}

// forward is the record that hands a delivery on to the gateway that the user is on.
func (k *claim) forward(d codec.Delivery, gateway string) *sideRecord {
	rec, target := d.Record, d.Record.Targets[d.Target]
	return &sideRecord{
		topic: k.c.opts.DownstreamPrefix + gateway,
		key:   []byte(target),
		value: codec.AppendForward(nil, rec, target),
		headers: appendTraceParent([]sarama.RecordHeader{
			{Key: headerHop, Value: []byte("1")},
			{Key: headerGatewayID, Value: k.c.producer.gatewayID},
		}, rec.TraceParent),
		done:    k.inbox.sideDone,
		record:  rec,
		target:  d.Target,
		gateway: gateway,
		end:     codec.EndForwarded,
	}
}

// known reads the headers of a record that the gateway knows: whether another one has handed it on, and the
// context of its trace; nil: it has none.
func known(headers []*sarama.RecordHeader) (hop bool, traceParent []byte) {
	for _, h := range headers {
		switch string(h.Key) {
		case string(headerHop):
			hop = true
		case string(headerTraceParent):
			traceParent = h.Value
		}
	}
	return hop, traceParent
}

// overdue is how old what is open must be for it to be given up when the window is full.
const overdue = time.Second

// giveUpMax is how many records are given up together at most.
const giveUpMax = 1000

// giveUp makes the shards end what is open for too long while the partition waits for it: nobody holds
// an offset for ever.
func (k *claim) giveUp(ctx context.Context) error {
	before := time.Now().Add(-overdue).UnixMilli()
	for _, d := range k.window.overdue(before, giveUpMax) {
		for i, target := range d.Targets {
			k.put(codec.ShardOf(target, k.c.shards), codec.Delivery{Record: d, Target: int32(i)})
		}
	}
	return k.send(ctx, true)
}

// deliverAgain gives the shards what users came for in the meantime.
func (k *claim) deliverAgain(ctx context.Context) error {
	for _, d := range k.again {
		k.put(codec.ShardOf(d.Record.Targets[d.Target], k.c.shards), d)
	}
	k.again = k.again[:0]
	return k.send(ctx, false)
}

// put gathers a delivery for its shard.
func (k *claim) put(shard int, d codec.Delivery) {
	b := k.byShard[shard]
	if b == nil {
		b = new(codec.DeliveryBatch)
		k.byShard[shard] = b
	}
	b.Deliveries = append(b.Deliveries, d)
}

// send hands what was gathered to the shards.
func (k *claim) send(ctx context.Context, giveUp bool) error {
	for shard, b := range k.byShard {
		if b == nil {
			continue
		}
		k.byShard[shard] = nil
		b.GiveUp = giveUp
		if err := k.c.dispatch(ctx, shard, b); err != nil {
			return err
		}
	}
	return nil
}
