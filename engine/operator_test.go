package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"im-gateway/codec/gatewaypb"
	"im-gateway/registry"
	"im-gateway/shard"
)

// operated is an Operator and what is around it.
type operated struct {
	*Operator
	ready   *Readiness
	deps    *dependencies
	log     *bytes.Buffer
	drained int
}

func newOperated(t *testing.T) *operated {
	t.Helper()
	o := &operated{ready: NewReadiness("kafka"), log: &bytes.Buffer{}}
	reg := prometheus.NewRegistry()
	log := zerolog.New(o.log)
	var err error
	if o.deps, err = newDependencies([]string{"kafka", "redis"}, log, reg); err != nil {
		t.Fatal(err)
	}
	cfg := Default()
	cfg.GatewayID, cfg.Admin.Token = "g-1", "s3cret"
	o.Operator = NewOperator(OperatorOptions{
		Config: func() *Config { return &cfg }, Version: "v9", Started: time.UnixMilli(1000), Readiness: o.ready, Dependencies: o.deps,
		Metrics: reg, Drain: func() { o.drained++ }, Logger: log,
	})
	return o
}

// serving gives it sessions: two of alice's here, one of bob's elsewhere.
func (o *operated) serving() *operated {
	o.ready.Met("kafka")
	o.serve(operatorParts{
		sessions: &fakeSessions{
			list: func(user string) ([]SessionInfo, error) {
				if user != "alice" {
					return nil, nil
				}
				return []SessionInfo{{Name: "s-1", State: "live", MessagesIn: 3}, {Name: "s-2", State: "live"}}, nil
			},
			kick: func(user, session string, replaced bool, reason string) (int, error) {
				switch {
				case replaced:
					return 0, errors.New("a kick is no replacement")
				case user == "alice" && session == "s-1":
					return 1, nil
				case user == "alice" && session == "":
					return 2, nil
				}
				return 0, nil
			},
		},
		measure: func(_ context.Context, window time.Duration) (shard.Talks, error) {
			return shard.Talks{Window: window, Missed: 4, Users: []shard.Talk{
				{User: "alice", In: 5, BytesIn: 50, Out: 1, BytesOut: 9}, {User: "bob", Out: 7}, {User: "carol", In: 1},
			}}, nil
		},
		locate: func(_ context.Context, users []string) []registry.Located {
			switch users[0] {
			case "alice":
				return []registry.Located{{Sessions: []registry.Location{{GatewayID: "g-1", Session: "s-1"}}}}
			case "bob":
				return []registry.Located{{Sessions: []registry.Location{{GatewayID: "g-2", Session: "s-9", ConnectedAt: 5, DeviceKind: "web"}}}}
			case "lost":
				return []registry.Located{{Err: errors.New("i/o timeout")}}
			}
			return []registry.Located{{}}
		},
	})
	return o
}

func TestOperatorStatus(t *testing.T) {
	o := newOperated(t)
	o.deps.saw("kafka", errors.New("connection refused"))
	o.ready.Waiting("kafka", "connection refused")
	look := func() *gatewaypb.StatusResponse {
		t.Helper()
		s, err := o.Status(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := look()
	if s.GetState() != "starting" || len(s.GetMissing()) != 1 || s.GetMissing()[0].GetReason() != "connection refused" ||
		s.GetGatewayId() != "g-1" || s.GetVersion() != "v9" || s.GetStartedAt() != 1000 || !s.GetActing() || s.GetMemoryBytes() <= 0 {
		t.Errorf("while starting: %v", s)
	}
	if d := s.GetDependencies(); len(d) != 2 || d[0].GetState() != "down" || d[0].GetError() != "connection refused" || d[1].GetState() != "unknown" {
		t.Errorf("dependencies: %v", d)
	}
	for name, call := range map[string]func() error{
		"find": func() error { _, err := o.FindUser(t.Context(), &gatewaypb.FindUserRequest{UserId: "a"}); return err },
		"kick": func() error { _, err := o.KickUser(t.Context(), &gatewaypb.KickUserRequest{UserId: "a"}); return err },
		"top":  func() error { _, err := o.TopTalkers(t.Context(), &gatewaypb.TopTalkersRequest{}); return err },
	} {
		if err := call(); status.Code(err) != codes.Unavailable {
			t.Errorf("%s without sessions: %v", name, err)
		}
	}
	o.serving()
	o.deps.saw("kafka", nil)
	if s := look(); s.GetState() != "ready" || len(s.GetMissing()) != 0 || s.GetSessions() != 7 || s.GetUsers() != 6 ||
		s.GetDependencies()[0].GetState() != "up" || s.GetDependencies()[0].GetError() != "" {
		t.Errorf("when ready: %v", s)
	}
	o.ready.Drain("stopping")
	if s := look(); s.GetState() != "draining" || len(s.GetMissing()) != 0 {
		t.Errorf("while draining: %v", s)
	}
}

func TestDependencyStates(t *testing.T) {
	o := newOperated(t)
	o.deps.every = time.Millisecond
	answers := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- o.deps.watch(ctx, "redis", func(ctx context.Context) error {
			if _, ok := ctx.Deadline(); !ok {
				t.Error("it may take for ever")
			}
			select {
			case err := <-answers:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	// An answer has been taken in when the next is asked for.
	answer := func(err error) dependencyState {
		answers <- err
		answers <- err
		return o.deps.states()[1]
	}
	up := answer(nil)
	if up.State != "up" || up.Error != "" {
		t.Errorf("after an answer: %+v", up)
	}
	if again := answer(nil); again.Since != up.Since {
		t.Errorf("since %s, then %s", up.Since, again.Since)
	}
	if down := answer(errors.New("refused")); down.State != "down" || down.Error != "refused" || down.Since.Before(up.Since) {
		t.Errorf("after an error: %+v", down)
	}
	if other := answer(errors.New("timeout")); other.Error != "timeout" {
		t.Errorf("after another error: %+v", other)
	}
	if n := testutil.ToFloat64(o.deps.up.WithLabelValues("redis")); n != 0 {
		t.Errorf("the metric says %f", n)
	}
	answer(nil)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := o.deps.states()[1]; s.State != "up" {
		t.Errorf("the end counts as an outage: %+v", s)
	}
	if log := o.log.String(); strings.Count(log, "does not answer") != 1 || strings.Count(log, "answers again") != 1 {
		t.Errorf("log:\n%s", log)
	}
}

func TestOperatorTopTalkers(t *testing.T) {
	o := newOperated(t).serving()
	r, err := o.TopTalkers(t.Context(), &gatewaypb.TopTalkersRequest{Limit: 1})
	if err != nil || r.GetWindowMs() != 3000 || r.GetUsers() != 3 || r.GetMissed() != 4 ||
		len(r.GetSenders()) != 1 || r.GetSenders()[0].GetUserId() != "alice" || r.GetSenders()[0].GetBytesIn() != 50 ||
		len(r.GetReceivers()) != 1 || r.GetReceivers()[0].GetUserId() != "bob" {
		t.Errorf("%v %v", r, err)
	}
	for _, bad := range []*gatewaypb.TopTalkersRequest{{Limit: -1}, {Limit: 101}, {WindowMs: 99}, {WindowMs: 30_001}, {WindowMs: -5}} {
		if _, err := o.TopTalkers(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestOperatorFindAndKick(t *testing.T) {
	o := newOperated(t).serving()
	find := func(user string) *gatewaypb.FindUserResponse {
		t.Helper()
		r, err := o.FindUser(t.Context(), &gatewaypb.FindUserRequest{UserId: user})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := find("alice"); len(r.GetSessions()) != 2 || len(r.GetElsewhere()) != 0 || r.GetGatewayId() != "g-1" {
		t.Errorf("alice: %v", r)
	}
	if r := find("bob"); len(r.GetSessions()) != 0 || len(r.GetElsewhere()) != 1 || r.GetElsewhere()[0].GetGatewayId() != "g-2" || r.GetElsewhere()[0].GetDevice() != "web" {
		t.Errorf("bob: %v", r)
	}
	if r := find("lost"); r.GetElsewhereError() != "i/o timeout" {
		t.Errorf("without Redis: %v", r)
	}
	for request, closed := range map[*gatewaypb.KickUserRequest]int32{
		{UserId: "alice", SessionId: "s-1", Reason: "why not"}: 1, {UserId: "alice"}: 2, {UserId: "nobody"}: 0,
	} {
		if r, err := o.KickUser(t.Context(), request); err != nil || r.GetClosed() != closed {
			t.Errorf("kick %v: %v %v", request, r, err)
		}
	}
	if log := o.log.String(); !strings.Contains(log, `"user_id":"alice","session_id":"s-1","reason":"why not","closed":1`) {
		t.Errorf("log:\n%s", log)
	}
	for _, user := range []string{"", "a\nb", strings.Repeat("u", 129)} {
		if _, err := o.FindUser(t.Context(), &gatewaypb.FindUserRequest{UserId: user}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("find %q: %v", user, err)
		}
		if _, err := o.KickUser(t.Context(), &gatewaypb.KickUserRequest{UserId: user}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("kick %q: %v", user, err)
		}
	}
	if _, err := o.KickUser(t.Context(), &gatewaypb.KickUserRequest{UserId: "a", Reason: strings.Repeat("r", 101)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a long reason: %v", err)
	}
}

func TestOperatorLogLevel(t *testing.T) {
	keepLogLevel(t)
	o := newOperated(t)
	for _, level := range []string{"debug", "error", "warn", "info"} {
		o.log.Reset()
		if r, err := o.SetLogLevel(t.Context(), &gatewaypb.SetLogLevelRequest{Level: level}); err != nil || r.GetLevel() != level {
			t.Errorf("%s: %v %v", level, r, err)
		}
		if r, err := o.GetLogLevel(t.Context(), nil); err != nil || r.GetLevel() != level {
			t.Errorf("%s: %v %v", level, r, err)
		}
		var line map[string]string
		if err := json.Unmarshal(o.log.Bytes(), &line); err != nil || line["level"] != "info" || line["to"] != level {
			t.Errorf("%s is logged as %s", level, o.log)
		}
	}
	for _, level := range []string{"", "fatal", "disabled", "INFO"} {
		if _, err := o.SetLogLevel(t.Context(), &gatewaypb.SetLogLevelRequest{Level: level}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", level, err)
		}
	}
}

// adminPort returns a handler with the token "s3cret", or without one, and a way to post to it.
func adminPort(t *testing.T, o *operated, token string) func(path, authorization, body string) (int, string) {
	t.Helper()
	h, err := NewAdmin(AdminOptions{
		Readiness: o.ready, Registry: prometheus.NewRegistry(), Logger: zerolog.Nop(), Operator: o, Token: testActing(t, token),
	})
	if err != nil {
		t.Fatal(err)
	}
	return func(path, authorization, body string) (int, string) {
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
		r.RemoteAddr = "192.0.2.1:1234"
		if authorization != "" {
			r.Header.Set("Authorization", authorization)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code, strings.TrimSpace(w.Body.String())
	}
}

func TestAdminActions(t *testing.T) {
	keepLogLevel(t)
	o := newOperated(t).serving()
	post := adminPort(t, o, "s3cret")
	const right = "Bearer s3cret"
	for _, tc := range []struct {
		path, body string
		status     int
		want       string
	}{
		{"/token", "", 204, ""},
		{"/kick", `{"user_id":"alice","session_id":"s-1","reason":"r"}`, 200, `{"closed":1}`},
		{"/kick", `{"userId":"alice"}`, 200, `{"closed":2}`},
		{"/kick", `{"user_id":"nobody"}`, 200, `{"closed":0}`},
		{"/kick", `{}`, 400, "user_id"},
		{"/kick", `{"user":"alice"}`, 400, "not the JSON"},
		{"/kick", `user=alice`, 400, "not the JSON"},
		{"/kick", `{"user_id":"` + strings.Repeat("a", maxActionBody) + `"}`, 400, "too large"},
		{"/log-level", `{"level":"error"}`, 200, `{"level":"error"}`},
		{"/log-level", `{"level":"loud"}`, 400, "trace, debug, info, warn or error"},
		{"/drain", "", 202, `{"draining":true}`},
	} {
		if code, body := post(tc.path, right, tc.body); code != tc.status || !strings.Contains(body, tc.want) {
			t.Errorf("%s %.60s: %d %s, want %d %s", tc.path, tc.body, code, body, tc.status, tc.want)
		}
	}
	if o.drained != 1 || (LogLevel{}).String() != "error" {
		t.Errorf("drained %d times, level %s", o.drained, LogLevel{})
	}
}

// TestAdminActionsNeedTheToken: nothing is done without it, on any route, nor where none is configured.
func TestAdminActionsNeedTheToken(t *testing.T) {
	keepLogLevel(t)
	level := LogLevel{}.String()
	bodies := map[string]string{"/token": "", "/drain": "", "/kick": `{"user_id":"alice"}`, "/log-level": `{"level":"error"}`}
	for path, body := range bodies {
		o := newOperated(t).serving()
		o.serve(operatorParts{sessions: &fakeSessions{}}) // a kick would panic
		off := adminPort(t, o, "")
		for _, given := range []string{"", "Bearer ", "Bearer s3cret", "Bearer"} {
			if code, text := off(path, given, body); code != 403 || !strings.Contains(text, "no admin.token is configured") {
				t.Errorf("%s without a configured token, given %q: %d %s", path, given, code, text)
			}
		}
		on := adminPort(t, o, "s3cret")
		for _, given := range []string{"", "Bearer ", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cre", "Bearer s3cret2", "Bearer S3CRET"} {
			if code, text := on(path, given, body); code != 403 || strings.Contains(text, "s3cret") {
				t.Errorf("%s given %q: %d %s", path, given, code, text)
			}
		}
		if o.drained != 0 || (LogLevel{}).String() != level {
			t.Errorf("%s was done", path)
		}
	}
}

// TestWrongTokensAreLimited: who has guessed too often waits, with the right token too; others do not.
func TestWrongTokensAreLimited(t *testing.T) {
	reg := prometheus.NewRegistry()
	a, err := newActingToken("s3cret", reg)
	if err != nil {
		t.Fatal(err)
	}
	for i := range wrongTokensPerMinute {
		if err := a.check(fmt.Sprintf("192.0.2.1:%d", i), "Bearer wrong"); status.Code(err) != codes.Unauthenticated {
			t.Errorf("guess %d: %v", i, err)
		}
	}
	for _, token := range []string{"wrong", "s3cret"} {
		if err := a.check("192.0.2.1:99", "Bearer "+token); status.Code(err) != codes.ResourceExhausted || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s after %d guesses: %v", token, wrongTokensPerMinute, err)
		}
	}
	for range 3 * wrongTokensPerMinute { // the right one may be shown as often as one likes
		if err := a.check("[2001:db8::1]:5", "bearer s3cret"); err != nil {
			t.Fatalf("another address: %v", err)
		}
	}
	got, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]float64{}
	for _, f := range got {
		for _, m := range f.GetMetric() {
			counts[label(m)] = m.GetCounter().GetValue()
		}
	}
	if counts["wrong"] != wrongTokensPerMinute || counts["limited"] != 2 || counts["missing"] != 0 {
		t.Errorf("counted %v", counts)
	}
}

// TestAdminServiceTokens: which token each method asks for, by what is configured.
func TestAdminServiceTokens(t *testing.T) {
	acts := map[string]bool{"KickUser": true, "Drain": true, "SetLogLevel": true}
	for _, tc := range []struct {
		name, grpc, admin, given string
		look, act                codes.Code // Unimplemented: let through
	}{
		{"nothing configured", "", "", "", codes.Unimplemented, codes.FailedPrecondition},
		{"nothing configured, one given", "", "", "x", codes.Unimplemented, codes.FailedPrecondition},
		{"operators' only, none given", "", "op", "", codes.Unimplemented, codes.Unauthenticated},
		{"operators' only, wrong", "", "op", "x", codes.Unimplemented, codes.Unauthenticated},
		{"operators' only", "", "op", "op", codes.Unimplemented, codes.Unimplemented},
		{"gateways' only, none given", "gw", "", "", codes.Unauthenticated, codes.FailedPrecondition},
		{"gateways' only", "gw", "", "gw", codes.Unimplemented, codes.FailedPrecondition},
		{"both, none given", "gw", "op", "", codes.Unauthenticated, codes.Unauthenticated},
		{"both, wrong", "gw", "op", "x", codes.Unauthenticated, codes.Unauthenticated},
		{"both, gateways'", "gw", "op", "gw", codes.Unimplemented, codes.Unauthenticated},
		{"both, operators'", "gw", "op", "op", codes.Unimplemented, codes.Unimplemented},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, m := range gatewaypb.AdminService_ServiceDesc.Methods {
				_, conn := grpcServer(t, &fakeSessions{}, func(o *GRPCOptions) {
					o.Token, o.Acting = tc.grpc, testActing(t, tc.admin)
				}, nil)
				ctx := t.Context()
				if tc.given != "" {
					ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+tc.given)
				}
				want := tc.look
				if acts[m.MethodName] {
					want = tc.act
				}
				err := conn.Invoke(ctx, "/im.gateway.v1.AdminService/"+m.MethodName, &gatewaypb.StatusRequest{}, &gatewaypb.StatusResponse{})
				if status.Code(err) != want {
					t.Errorf("%s: %v, want %s", m.MethodName, err, want)
				}
			}
			// The operators' token opens nothing else.
			if tc.grpc != "" && tc.given == "op" {
				_, conn := grpcServer(t, &fakeSessions{}, func(o *GRPCOptions) { o.Token, o.Acting = tc.grpc, testActing(t, tc.admin) }, nil)
				ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer op")
				if _, err := gatewaypb.NewGatewayServiceClient(conn).Stats(ctx, &gatewaypb.StatsRequest{}); status.Code(err) != codes.Unauthenticated {
					t.Errorf("Stats: %v", err)
				}
			}
		})
	}
}

// TestQueuesStandAmongTheMetrics: what the list of queues names is there in a gateway that has started its
// parts.
func TestQueuesStandAmongTheMetrics(t *testing.T) {
	cfg := Default()
	cfg.GatewayID, cfg.Auth.HS256Secret = "g-1", "0123456789abcdef0123456789abcdef"
	cfg.HTTP.Addr, cfg.Shard.Count, cfg.Logic.Target = "127.0.0.1:0", 3, "127.0.0.1:1"
	e, err := New(Fixed(cfg), zerolog.New(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	if err := e.startShards(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		e.abort()
		for _, task := range e.tasks {
			<-task.done
		}
		_ = e.logic.Close()
	}()
	r, err := read(e.metrics)
	if err != nil {
		t.Fatal(err)
	}
	list := queues()
	if len(list) < 15 {
		t.Errorf("only %d queues", len(list))
	}
	for _, q := range list {
		for _, s := range []series{q.depth, q.bound, q.overflows} {
			if _, n := r.sum(s); n == 0 && s.name != "" {
				t.Errorf("%s: there is no %v", q.name, s)
			}
		}
		if s := q.state(r); s.GetBound() <= 0 || s.GetDepth() != 0 || s.GetWhenFull() == "" {
			t.Errorf("%v", s)
		}
		if q.name == "loops to shards" && q.state(r).GetBound() != 3*64 {
			t.Errorf("bounds are not added up: %v", q.state(r))
		}
	}
}
