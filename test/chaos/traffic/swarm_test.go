package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// servers are Kafka with two gateways' topics and Redis.
type servers struct {
	*kfake.Cluster
	redis *miniredis.Miniredis
}

func startServers(t *testing.T) *servers {
	k, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "down-gw", "down-gw2", "undelivered", "dead"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return &servers{k, miniredis.RunT(t)}
}

func (s *servers) sender(users ...string) SenderOptions {
	return SenderOptions{Brokers: s.ListenAddrs(), Redis: s.redis.Addr(), Prefix: "down-", Users: users, Every: 5 * time.Millisecond}
}

// consume passes each record of a topic on until the test ends.
func (s *servers) consume(t *testing.T, topic string, f func(r *kgo.Record)) {
	c, err := kgo.NewClient(kgo.SeedBrokers(s.ListenAddrs()...), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			fs := c.PollFetches(context.Background())
			if fs.IsClientClosed() {
				return
			}
			fs.EachRecord(f)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

func startSender(t *testing.T, ctx context.Context, o SenderOptions) (*Sender, *Log) {
	log := &Log{}
	s, err := NewSender(o, log)
	if err != nil {
		t.Fatal(err)
	}
	s.Start(ctx)
	t.Cleanup(s.Close)
	return s, log
}

func untilProduced(t *testing.T, ctx context.Context, log *Log, ok func(p []Produced) bool) []Produced {
	t.Helper()
	var p []Produced
	if err := poll(ctx, func() error {
		if p = log.Snapshot().Produced; ok(p) {
			return nil
		}
		return fmt.Errorf("produced %+v", p)
	}); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSenderFollowsTheUser(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	srv := startServers(t)
	s, log := startSender(t, ctx, srv.sender("u"))
	srv.redis.HSet("user_session:u", "gateway_id", "gw") // unknown until now
	untilProduced(t, ctx, log, func(p []Produced) bool { return len(p) > 3 })
	srv.redis.HSet("user_session:u", "gateway_id", "gw2")
	untilProduced(t, ctx, log, func(p []Produced) bool { return p[len(p)-1].Topic == "down-gw2" })
	srv.redis.Del("user_session:u") // the last one known goes on
	n := len(log.Snapshot().Produced)
	untilProduced(t, ctx, log, func(p []Produced) bool { return len(p) > n+100 })
	srv.redis.Close()
	n = len(log.Snapshot().Produced)
	untilProduced(t, ctx, log, func(p []Produced) bool { return len(p) > n+3 })
	s.StopSending()
	s.Close()
	if s.Busy() != 0 {
		t.Errorf("%d records under way after Close", s.Busy())
	}
	stored := make(map[string]string)
	offsets := make(chan *kgo.Record, 10000) // more than there are
	for _, topic := range []string{"down-gw", "down-gw2"} {
		srv.consume(t, topic, func(r *kgo.Record) { offsets <- r })
	}
	produced := log.Snapshot().Produced
	for range produced {
		r := <-offsets
		stored[fmt.Sprintf("%s/%d@%d", r.Topic, r.Partition, r.Offset)] = fmt.Sprintf("%s %s", r.Key, r.Value)
	}
	for i, p := range produced {
		want := fmt.Sprintf(`u {"target_user_id":"u","message_id":"d-u-%d","data":{"seq":%d}}`, i+1, i+1)
		if got := stored[fmt.Sprintf("%s/%d@%d", p.Topic, p.Partition, p.Offset)]; got != want || p.Seq != int64(i+1) {
			t.Fatalf("at %+v is %s, want %s", p, got, want)
		}
	}
}

func TestSenderRepeatsWhatKafkaRefused(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	srv := startServers(t)
	fault := srv.Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Topic: "down-gw", Err: kerr.TopicAuthorizationFailed, Count: 3})
	defer fault.Remove()
	srv.redis.HSet("user_session:u", "gateway_id", "gw")
	s, log := startSender(t, ctx, srv.sender("u"))
	p := untilProduced(t, ctx, log, func(p []Produced) bool { return len(p) >= 2 })
	if p[0].MessageID != "d-u-1" || p[1].MessageID != "d-u-2" || s.FailedAttempts() != 3 {
		t.Errorf("produced %+v after %d failures", p[:2], s.FailedAttempts())
	}
}

// relay serves a user: messages are acknowledged, and records of the topic pushed, as long as keep
// says so.
func relay(t *testing.T, srv *servers, topic string, keep func(r *kgo.Record) bool) func(p *peer) {
	return func(p *peer) {
		p.accept()
		go func() { // the reader; ends with the connection
			defer func() { _ = recover() }()
			for n := 0; ; n++ {
				if m := p.receive(); m.Type == "send-message" {
					p.success(m.MessageID, n)
				}
			}
		}()
		k, err := kgo.NewClient(kgo.SeedBrokers(srv.ListenAddrs()...), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
		if err != nil {
			t.Error(err)
			return
		}
		defer k.Close()
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		for n := 1; ; {
			var r struct {
				MessageID string   `json:"message_id"`
				Data      downData `json:"data"`
			}
			pctx, pcancel := context.WithTimeout(ctx, 100*time.Millisecond)
			fs := k.PollFetches(pctx)
			pcancel()
			p.send("pong", "{}") // notices that the client is gone
			for _, rec := range fs.Records() {
				if !keep(rec) {
					continue
				}
				if err := json.Unmarshal(rec.Value, &r); err != nil {
					t.Error(err)
				}
				p.push(r.MessageID, n, int(r.Data.Seq))
				n++
			}
		}
	}
}

func TestSwarmIsQuietWhenAllIsAccountedFor(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		ack   bool
		keep  bool // the seventh record
		end   bool // it goes to undelivered
		quiet bool
	}{
		{"all received", true, true, false, true},
		{"one undelivered", true, false, true, true},
		{"one lost", true, false, false, false},
		{"one lost without acks", false, false, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			srv := startServers(t)
			srv.redis.HSet("user_session:u", "gateway_id", "gw")
			g := newGateway(t, relay(t, srv, "down-gw", func(r *kgo.Record) bool { return tc.keep || r.Offset != 6 }))
			s, err := Start(ctx, SwarmOptions{
				Clients: []ClientOptions{{User: "u", Addrs: []string{g.addr}, Ack: tc.ack, Every: every,
					Token: func(string) (string, error) { return "t", nil }}},
				Sender: srv.sender("u"), Undelivered: "undelivered", Deadletter: "dead",
			})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.WaitOnline(ctx); err != nil {
				t.Fatal(err)
			}
			untilProduced(t, ctx, s.Log, func(p []Produced) bool { return len(p) > 10 })
			s.StopSending()
			if tc.end {
				c, err := kgo.NewClient(kgo.SeedBrokers(srv.ListenAddrs()...))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if err := c.ProduceSync(ctx, &kgo.Record{Topic: "undelivered", Key: []byte("u"),
					Headers: []kgo.RecordHeader{{Key: "message_id", Value: []byte("d-u-7")}}}).FirstErr(); err != nil {
					t.Fatal(err)
				}
			}
			timeout := testTimeout
			if !tc.quiet {
				timeout = settleTime + 2*time.Second // beyond what others are given
			}
			err = s.WaitQuiet(ctx, timeout)
			if tc.quiet && err != nil {
				t.Errorf("not quiet: %v", err)
			}
			if !tc.quiet && (!errors.Is(err, ErrNotQuiet) || !strings.Contains(err.Error(), "1 records without an end, 1 of them of users who acknowledge, the first d-u-7 at down-gw/0@6")) {
				t.Errorf("WaitQuiet: %v", err)
			}
		})
	}
}

func TestSwarmIsNotQuietWithAMessageOutstanding(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	g := newGateway(t, func(p *peer) {
		p.accept()
		p.receive()
		p.idle()
	})
	s, err := Start(ctx, SwarmOptions{Clients: []ClientOptions{{User: "u", Addrs: []string{g.addr}, Every: every,
		Token: func(string) (string, error) { return "t", nil }}}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := poll(ctx, func() error {
		if s.Clients[0].Outstanding() == 1 {
			return nil
		}
		return errors.New("nothing sent")
	}); err != nil {
		t.Fatal(err)
	}
	s.StopSending()
	if err := s.WaitQuiet(ctx, time.Second); !errors.Is(err, ErrNotQuiet) {
		t.Errorf("WaitQuiet: %v", err)
	}
}

func TestLogsAsAFile(t *testing.T) {
	t.Parallel()
	log := &Log{}
	r := log.Client(ClientLog{User: "u", Device: "d"})
	r.connect(Connect{Gateway: "gw"})
	r.sent(Sent{ID: "u-1"})
	r.ack(Ack{ID: "u-1"})
	r.push(Push{MessageID: "m", Data: json.RawMessage("1")})
	r.hint(Hint{})
	r.disconnect(Disconnect{Code: 4002})
	r.fail(Failure{What: "dial"})
	log.addProduced(Produced{MessageID: "d-u-1"})
	path := filepath.Join(t.TempDir(), "log.jsonl")
	if err := log.Snapshot().WriteFile(path); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var kinds []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var l struct {
			User, Kind string
			Event      map[string]any
		}
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil || l.Event == nil || (l.User == "u") != (l.Kind != "produced") {
			t.Errorf("line %s: %v", sc.Bytes(), err)
		}
		kinds = append(kinds, l.Kind)
	}
	if got, want := strings.Join(kinds, " "), "client connected sent ack push reconnect disconnected failure produced"; got != want {
		t.Errorf("kinds %s, want %s", got, want)
	}
}
