package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// fakeGateway acks each message as answer says; no answer where it returns "".
func fakeGateway(t *testing.T, answer func(id string) []string) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"im.json.v1"}})
		if err != nil {
			return
		}
		defer func() { _ = conn.CloseNow() }()
		_ = conn.Write(r.Context(), websocket.MessageText, []byte(`{"type":"connected","data":{}}`))
		for {
			_, b, err := conn.Read(r.Context())
			if err != nil {
				return
			}
			var m struct {
				ID string `json:"message_id"`
			}
			if err := json.Unmarshal(b, &m); err != nil {
				return
			}
			for _, a := range answer(m.ID) {
				_ = conn.Write(r.Context(), websocket.MessageText, []byte(a))
			}
		}
	}))
	t.Cleanup(srv.Close)
	return "ws" + strings.TrimPrefix(srv.URL, "http")
}

func ack(id string) string {
	return fmt.Sprintf(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"success"}}`, id)
}

func refusal(id, code string) string {
	return fmt.Sprintf(`{"type":"message-ack","data":{"client_msg_id":%q,"status":"error","code":%q}}`, id, code)
}

func TestUpstream(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer func(id string) []string
		broken string
		check  func(*UpstreamReport) bool
	}{
		{"all acked", func(id string) []string { return []string{ack(id)} }, "",
			func(r *UpstreamReport) bool { return r.Acked == r.Sent && r.Sent > 0 && r.P50 > 0 }},
		{"refused", func(id string) []string { return []string{refusal(id, "OVERLOADED")} }, "",
			func(r *UpstreamReport) bool { return r.Refused["OVERLOADED"] == r.Sent && r.Acked == 0 }},
		{"late success", func(id string) []string { return []string{refusal(id, "OUTCOME_UNKNOWN"), ack(id)} }, "",
			func(r *UpstreamReport) bool { return r.Late == r.Sent && r.Acked == r.Sent }},
		{"acked twice", func(id string) []string { return []string{ack(id), ack(id)} }, "second or unasked",
			func(*UpstreamReport) bool { return true }},
		{"never answered", func(string) []string { return nil }, "got no answer",
			func(r *UpstreamReport) bool { return r.Unacked == r.Sent }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rep, err := Upstream(context.Background(), UpstreamOptions{
				URL: fakeGateway(t, tc.answer), Secret: []byte("s"), Users: 3, Rate: 500,
				Duration: 100 * time.Millisecond, AckWait: 200 * time.Millisecond,
			})
			if rep == nil {
				t.Fatalf("no report: %v", err)
			}
			if (tc.broken != "") != errors.Is(err, ErrBroken) {
				t.Errorf("err = %v, broken = %v", err, rep.Broken)
			}
			if tc.broken != "" && !strings.Contains(strings.Join(rep.Broken, "\n"), tc.broken) {
				t.Errorf("broken = %q, want one with %q", rep.Broken, tc.broken)
			}
			if !tc.check(rep) {
				t.Errorf("report: %+v", rep)
			}
		})
	}
}

func TestUpstreamOptionsListsEveryProblem(t *testing.T) {
	_, err := Upstream(context.Background(), UpstreamOptions{Users: -1, Rate: -1, Size: 1 << 20})
	for _, want := range []string{"secret", "users", "rate", "size"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}
}
