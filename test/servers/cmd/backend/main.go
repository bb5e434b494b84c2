// Command backend runs what stands behind a gateway, embedded: Kafka, etcd, Redis and the reference im-logic.
// It is for suites that are not written in Go (clients/js); they start gateways beside it as they like.
//
// It prints one line of JSON, {"kafka","redis","etcd","http"}, the addresses, and ends when its standard input
// does, so that it outlives nobody. IM_AUTH_HS256_SECRET is the secret of the tokens. Over HTTP:
//
//	GET  /records?user=U&until=ID   U's upstream records in Kafka's order, once the one named ID is among them
//	POST /push?topic=T              produces the body to T
//	POST /kafka?away=true           Kafka takes no records, until away=false
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	clientv3 "go.etcd.io/etcd/client/v3"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/cmd/im-dev/logic"
)

const (
	upstream  = "im-upstream-topic"
	bodyLimit = 1 << 20
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "backend:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	servers, err := embedded.Start(ctx, embedded.Options{Topics: []string{upstream, "im-undelivered-topic", "im-deadletter-topic", "im-user-events-topic"}})
	if err != nil {
		return fmt.Errorf("embedded servers: %w", err)
	}
	defer func() { err = errors.Join(err, servers.Close()) }()
	im, err := logic.New(logic.Options{
		Kafka:  []kgo.Opt{kgo.SeedBrokers(servers.KafkaBrokers()...)},
		Redis:  rueidis.ClientOption{InitAddress: []string{servers.RedisAddr()}, ForceSingleClient: true},
		Etcd:   clientv3.Config{Endpoints: servers.EtcdEndpoints()},
		Secret: []byte(os.Getenv("IM_AUTH_HS256_SECRET")), Logger: zerolog.Nop(),
	})
	if err != nil {
		return fmt.Errorf("im-logic: %w", err)
	}
	ended := make(chan error, 2)
	go func() { ended <- im.Run(ctx) }()
	select {
	case <-im.Ready():
	case err := <-ended:
		return fmt.Errorf("im-logic: %w", err)
	}

	kafka, err := kgo.NewClient(kgo.SeedBrokers(servers.KafkaBrokers()...), kgo.ConsumeTopics(upstream),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)))
	if err != nil {
		return fmt.Errorf("kafka client: %w", err)
	}
	defer kafka.Close()
	s := &service{kafka: kafka, grown: make(chan struct{})}
	go s.consume(ctx)
	servers.KafkaCluster().ControlKey(int16(kmsg.Produce), func(kmsg.Request) (kmsg.Response, error, bool) {
		servers.KafkaCluster().KeepControl()
		if s.away.Load() {
			return nil, errors.New("away"), true
		}
		return nil, nil, false
	})

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	go func() { ended <- server.Serve(ln) }()
	defer func() { _ = server.Close() }()
	if err := json.NewEncoder(os.Stdout).Encode(map[string]string{
		"kafka": servers.KafkaBrokers()[0], "redis": servers.RedisAddr(), "etcd": servers.EtcdEndpoints()[0], "http": ln.Addr().String(),
	}); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// record is what a suite is told of an upstream record.
type record struct {
	ID        string          `json:"id"` // the client's
	User      string          `json:"user"`
	Type      string          `json:"type"`
	Gateway   string          `json:"gateway"`
	Session   string          `json:"session"`
	Device    string          `json:"device,omitempty"`
	Data      json.RawMessage `json:"data"`
	Partition int32           `json:"partition"`
	Offset    int64           `json:"offset"`
}

type service struct {
	kafka *kgo.Client
	away  atomic.Bool

	mu      sync.Mutex
	records []record
	grown   chan struct{} // closed, and made anew, when there are more
}

func (s *service) consume(ctx context.Context) {
	for {
		fetches := s.kafka.PollFetches(ctx)
		if ctx.Err() != nil || fetches.IsClientClosed() {
			return
		}
		s.mu.Lock()
		fetches.EachRecord(func(r *kgo.Record) {
			var v struct {
				ClientMsgID string          `json:"client_msg_id"`
				UserID      string          `json:"user_id"`
				GatewayID   string          `json:"gateway_id"`
				SessionID   string          `json:"session_id"`
				DeviceID    string          `json:"device_id"`
				Type        string          `json:"type"`
				Data        json.RawMessage `json:"data"`
			}
			if err := json.Unmarshal(r.Value, &v); err != nil {
				v.Type = "not JSON: " + err.Error() // a suite that looks for its message finds this
			}
			s.records = append(s.records, record{v.ClientMsgID, v.UserID, v.Type, v.GatewayID, v.SessionID, v.DeviceID, v.Data, r.Partition, r.Offset})
		})
		close(s.grown)
		s.grown = make(chan struct{})
		s.mu.Unlock()
	}
}

func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /records", func(w http.ResponseWriter, r *http.Request) {
		user, until := r.FormValue("user"), r.FormValue("until")
		for {
			s.mu.Lock()
			grown := s.grown
			found := slices.DeleteFunc(slices.Clone(s.records), func(r record) bool { return r.User != user })
			s.mu.Unlock()
			if slices.ContainsFunc(found, func(r record) bool { return r.ID == until }) {
				w.Header().Set("Content-Type", "application/json")
				_ = json.NewEncoder(w).Encode(found) // who asked may be gone
				return
			}
			select {
			case <-grown:
			case <-r.Context().Done():
				return
			}
		}
	})
	mux.HandleFunc("POST /push", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyLimit))
		if err == nil {
			err = s.kafka.ProduceSync(r.Context(), &kgo.Record{Topic: r.FormValue("topic"), Value: body}).FirstErr()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /kafka", func(w http.ResponseWriter, r *http.Request) {
		away, err := strconv.ParseBool(r.FormValue("away"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.away.Store(away)
	})
	return mux
}
