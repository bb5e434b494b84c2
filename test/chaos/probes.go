package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/test/chaos/world"
)

// Probes look at a fault from outside: by a connection of their own through the same proxies.

// roundTrip is how long the server behind an address takes to answer a command of its protocol.
func roundTrip(ctx context.Context, addr string, send string, timeout time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	began := time.Now()
	if _, err := io.WriteString(c, send); err != nil {
		return 0, err
	}
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return time.Since(began), err
	}
	return time.Since(began), nil
}

const (
	redisPing = "PING\r\n"
	// kafkaVersions is an ApiVersions request, version 0.
	kafkaVersions = "\x00\x00\x00\x0f\x00\x12\x00\x00\x00\x00\x00\x01\x00\x05probe"
	// http2Preface opens an HTTP/2 connection, which etcd and im-logic speak.
	http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
)

// post sends a request to a gateway's HTTP API.
func post(ctx context.Context, g *world.Gateway, path, body string) (status int, text string, took time.Duration, err error) {
	return postAs(ctx, g, "", path, body)
}

// postAs is post with a user's token, unless the user is empty.
func postAs(ctx context.Context, g *world.Gateway, user, path, body string) (status int, text string, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+g.Addr+path, strings.NewReader(body))
	if err != nil {
		return 0, "", 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	if user != "" {
		token, err := world.Token(user)
		if err != nil {
			return 0, "", 0, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	began := time.Now()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", time.Since(began), err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	return resp.StatusCode, string(b), time.Since(began), err
}

// dial opens a session and reads `connected`.
func dial(ctx context.Context, addr, user string) (*websocket.Conn, error) {
	token, err := world.Token(user)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://"+addr+"/ws?token="+token, nil)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	c.SetReadLimit(1 << 20)
	if _, _, err := c.Read(ctx); err != nil {
		_ = c.CloseNow()
		return nil, fmt.Errorf("read connected: %w", err)
	}
	return c, nil
}

// ask sends one frame on a session of its own and returns how that session ended.
func ask(ctx context.Context, addr, user, frame string) (websocket.StatusCode, error) {
	c, err := dial(ctx, addr, user)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.CloseNow() }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.Write(ctx, websocket.MessageText, []byte(frame)); err != nil {
		return 0, err
	}
	for {
		if _, _, err := c.Read(ctx); err != nil {
			return websocket.CloseStatus(err), nil
		}
	}
}

// produce writes records for one user straight to a gateway's topic.
func produce(ctx context.Context, w *world.World, gateway, user, id string, n, bytes int) error {
	var records []*kgo.Record
	filler := strings.Repeat("x", bytes)
	for i := range n {
		records = append(records, &kgo.Record{
			Topic: world.DownstreamPrefix + gateway, Key: []byte(user),
			Value: fmt.Appendf(nil, `{"target_user_id":%q,"message_id":"%s-%d","data":%q}`, user, id, i, filler),
		})
	}
	if err := w.Kafka.Client.ProduceSync(ctx, records...).FirstErr(); err != nil {
		return fmt.Errorf("produce: %w", err)
	}
	return nil
}

// undelivered counts the records on the undelivered topic whose message_id begins with a text, by reason.
func undelivered(ctx context.Context, w *world.World, prefix string) (map[string]int, error) {
	ends, err := w.Kafka.Admin.ListEndOffsets(ctx, world.UndeliveredTopic)
	if err != nil {
		return nil, fmt.Errorf("undelivered: %w", err)
	}
	left := map[int32]int64{}
	for p, o := range ends[world.UndeliveredTopic] {
		if o.Offset > 0 {
			left[p] = o.Offset
		}
	}
	c, err := kgo.NewClient(kgo.SeedBrokers(w.Kafka.Brokers()...), kgo.ConsumeTopics(world.UndeliveredTopic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return nil, fmt.Errorf("undelivered: %w", err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	found := map[string]int{}
	for len(left) > 0 && ctx.Err() == nil {
		for it := c.PollFetches(ctx).RecordIter(); !it.Done(); {
			r := it.Next()
			if r.Offset >= left[r.Partition]-1 {
				delete(left, r.Partition)
			}
			id, reason := "", ""
			for _, h := range r.Headers {
				switch h.Key {
				case "message_id":
					id = string(h.Value)
				case "reason":
					reason = string(h.Value)
				}
			}
			if strings.HasPrefix(id, prefix) {
				found[reason]++
			}
		}
	}
	return found, ctx.Err()
}
