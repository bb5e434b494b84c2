package main

import (
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/goccy/go-json"
	"github.com/gorilla/websocket"
)

const (
	heartbeat   = 30 * time.Second
	silence     = 75 * time.Second
	writeWait   = 10 * time.Second
	maxMessage  = 64 << 10
	maxName     = 128
	closeReason = 4500 // replaced by a newer session
)

// client is one connection: a goroutine that reads, one that writes, and the queue between.
type client struct {
	srv       *server
	conn      *websocket.Conn
	user      string
	session   string
	connected time.Time
	out       chan *outbound
	done      chan struct{} // closed when the connection ends
	end       sync.Once
}

// outbound is one frame: bytes for this client alone, or a frame encoded once for many.
type outbound struct {
	data     []byte
	prepared *websocket.PreparedMessage
}

type envelope struct {
	Type      string          `json:"type"`
	MessageID string          `json:"message_id"`
	Data      json.RawMessage `json:"data"`
	Timestamp int64           `json:"timestamp"`
}

// send queues a frame, or drops it when the queue is full.
func (c *client) send(o *outbound, dropped *atomic.Int64) {
	select {
	case c.out <- o:
	default:
		dropped.Add(1)
	}
}

func (c *client) close() {
	c.end.Do(func() {
		close(c.done)
		_ = c.conn.Close()
	})
}

// closeWith tells the client why before it closes.
func (c *client) closeWith(code int, reason string) {
	_ = c.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(time.Second))
	c.close()
}

var readBuffers = sync.Pool{New: func() any { return new(readBuffer) }}

// readBuffer holds one message while it is handled; an idle connection has none.
type readBuffer struct{ b []byte }

func (r *readBuffer) readAll(from io.Reader) error {
	if r.b == nil {
		r.b = make([]byte, 0, 1024)
	}
	r.b = r.b[:0]
	for {
		n, err := from.Read(r.b[len(r.b):cap(r.b)])
		r.b = r.b[:len(r.b)+n]
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if len(r.b) == cap(r.b) {
			r.b = append(r.b, 0)[:len(r.b)]
		}
	}
}

func (c *client) read() {
	defer c.srv.leave(c)
	c.conn.SetReadLimit(maxMessage)
	_ = c.conn.SetReadDeadline(time.Now().Add(silence))
	c.conn.SetPongHandler(func(string) error { return c.conn.SetReadDeadline(time.Now().Add(silence)) })
	for {
		kind, r, err := c.conn.NextReader()
		if err != nil {
			return
		}
		buf := readBuffers.Get().(*readBuffer)
		if err = buf.readAll(r); err == nil {
			c.handle(kind, buf.b)
		}
		readBuffers.Put(buf)
		if err != nil {
			return
		}
	}
}

// handle must not keep b.
func (c *client) handle(kind int, b []byte) {
	var e envelope
	if kind != websocket.TextMessage || json.UnmarshalNoEscape(b, &e) != nil || e.Type == "" || len(e.MessageID) > maxName {
		c.send(&outbound{data: []byte(`{"type":"error","data":{"code":"INVALID_MESSAGE","message":"not an envelope"}}`)}, &c.srv.stats.acksDropped)
		return
	}
	if e.Type == "ping" {
		c.send(&outbound{data: []byte(`{"type":"pong"}`)}, &c.srv.stats.acksDropped)
		return
	}
	c.srv.upstream.publish(c, &e)
}

// ack answers a named message; code is empty for a success.
func (c *client) ack(name, topic string, partition int, offset int64, code string) {
	if name == "" {
		return
	}
	b := make([]byte, 0, 128+len(name)+len(topic))
	b = append(b, `{"type":"message-ack","data":{"client_msg_id":`...)
	b = appendString(b, name)
	if code == "" {
		b = append(b, `,"status":"success","topic":"`...)
		b = append(b, topic...)
		b = append(b, `","partition":`...)
		b = strconv.AppendInt(b, int64(partition), 10)
		b = append(b, `,"offset":`...)
		b = strconv.AppendInt(b, offset, 10)
	} else {
		b = append(b, `,"status":"error","code":"`...)
		b = append(b, code...)
		b = append(b, '"')
	}
	b = append(b, "}}"...)
	c.send(&outbound{data: b}, &c.srv.stats.acksDropped)
}

func (c *client) write() {
	ping := time.NewTicker(heartbeat)
	defer ping.Stop()
	defer c.close()
	for {
		var err error
		select {
		case <-c.done:
			return
		case o := <-c.out:
			_ = c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			if o.prepared != nil {
				err = c.conn.WritePreparedMessage(o.prepared)
			} else {
				err = c.conn.WriteMessage(websocket.TextMessage, o.data)
			}
		case <-ping.C:
			err = c.conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(writeWait))
		}
		if err != nil {
			return
		}
	}
}

// appendString appends s as JSON: as it is where nothing is to be escaped.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if s[i] < ' ' || s[i] == '"' || s[i] == '\\' || s[i] > '~' {
			q, err := json.Marshal(s)
			if err != nil {
				return append(b, `""`...)
			}
			return append(b, q...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
