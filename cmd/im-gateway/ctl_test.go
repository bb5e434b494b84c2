package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"im-gateway/codec/gatewaypb"
)

// operator answers as a gateway does.
type operator struct {
	gatewaypb.UnimplementedAdminServiceServer
	token string // of the last call
	kick  *gatewaypb.KickUserRequest
	top   *gatewaypb.TopTalkersRequest
	slow  chan struct{} // GetLogLevel has been called, and never answers
}

func (o *operator) Status(ctx context.Context, _ *gatewaypb.StatusRequest) (*gatewaypb.StatusResponse, error) {
	o.token = strings.Join(metadata.ValueFromIncomingContext(ctx, "authorization"), ",")
	return &gatewaypb.StatusResponse{
		GatewayId: "g-1", Version: "v9", State: "starting", StartedAt: 1000, Now: 3_661_000, Sessions: 3, Users: 2,
		Missing:     []*gatewaypb.Condition{{Name: "kafka", Reason: "connection refused"}},
		MemoryBytes: 3 << 30, MemoryLimitBytes: 4 << 30, LogLevel: "info",
		Dependencies: []*gatewaypb.Dependency{{Name: "kafka", State: "down", Since: 3_600_000, Error: "connection refused"}},
	}, nil
}

func (o *operator) Ledger(context.Context, *gatewaypb.LedgerRequest) (*gatewaypb.LedgerResponse, error) {
	return &gatewaypb.LedgerResponse{
		Upstream:   &gatewaypb.Account{In: 9_007_199_254_740_000, Open: 1, Ends: map[string]int64{"stored": 7}, Balanced: true},
		Downstream: &gatewaypb.Account{In: 9, Ends: map[string]int64{"delivered": 8}},
	}, nil
}

func (o *operator) Queues(context.Context, *gatewaypb.QueuesRequest) (*gatewaypb.QueuesResponse, error) {
	return &gatewaypb.QueuesResponse{Queues: []*gatewaypb.Queue{{Name: "user events", Unit: "records", Bound: 8192, Overflows: 12, WhenFull: "dropped"}}}, nil
}

func (o *operator) TopTalkers(_ context.Context, r *gatewaypb.TopTalkersRequest) (*gatewaypb.TopTalkersResponse, error) {
	o.top = r
	return &gatewaypb.TopTalkersResponse{
		WindowMs: 2000, Users: 4, Missed: 5, Senders: []*gatewaypb.Talker{{UserId: "alice", MessagesIn: 5, BytesIn: 1000}},
	}, nil
}

func (o *operator) FindUser(_ context.Context, r *gatewaypb.FindUserRequest) (*gatewaypb.FindUserResponse, error) {
	answer := &gatewaypb.FindUserResponse{GatewayId: "g-1", UserId: r.GetUserId()}
	switch r.GetUserId() {
	case "alice":
		answer.Sessions = []*gatewaypb.Session{{SessionId: "s-1", State: "live", ConnectedAt: 1_795_874_169_956, PendingBytes: 2048, Device: "web"}}
		answer.Elsewhere = []*gatewaypb.Place{{GatewayId: "g-2", SessionId: "s-2"}}
	case "lost":
		answer.ElsewhereError = "i/o timeout"
	case "bad":
		return nil, status.Error(codes.InvalidArgument, "user_id: not one")
	}
	return answer, nil
}

func (o *operator) KickUser(_ context.Context, r *gatewaypb.KickUserRequest) (*gatewaypb.KickUserResponse, error) {
	o.kick = r
	switch r.GetUserId() {
	case "alice":
		return &gatewaypb.KickUserResponse{Closed: 2}, nil
	case "refused":
		return nil, status.Error(codes.Unauthenticated, "this is not the token configured as admin.token")
	case "off":
		return nil, status.Error(codes.FailedPrecondition, "acting is off: no admin.token is configured")
	}
	return &gatewaypb.KickUserResponse{}, nil
}

func (o *operator) GetLogLevel(ctx context.Context, _ *gatewaypb.GetLogLevelRequest) (*gatewaypb.LogLevelResponse, error) {
	if o.slow != nil {
		close(o.slow)
		<-ctx.Done()
	}
	return &gatewaypb.LogLevelResponse{Level: "info"}, nil
}

func (o *operator) SetLogLevel(_ context.Context, r *gatewaypb.SetLogLevelRequest) (*gatewaypb.LogLevelResponse, error) {
	return &gatewaypb.LogLevelResponse{Level: r.GetLevel()}, nil
}

// listen serves an operator and returns its address.
func (o *operator) listen(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	gatewaypb.RegisterAdminServiceServer(server, o)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func ctlWith(t *testing.T, environ []string, stop chan os.Signal, args ...string) result {
	t.Helper()
	return runWith(t, append([]string{"ctl"}, args...), environ, nil, nil, signals{stop: stop})
}

func TestCtlShows(t *testing.T) {
	o := &operator{}
	addr := o.listen(t)
	for _, tc := range []struct {
		args   string
		code   int
		stdout []string
		stderr string
	}{
		{"status", 0, []string{"g-1, version v9", "starting, up 1h1m0s", "waiting for  kafka: connection refused", "3 of 2 users",
			"3.0 GiB, limit 4.0 GiB", "off: no admin.token is configured", "kafka       down   1m1s  connection refused"}, ""},
		{"ledger", 0, []string{"CLIENT MESSAGES  9007199254740000", "stored", "DELIVERIES", "still counting"}, ""},
		{"queues", 0, []string{"user events  0      8192     records  12        dropped"}, ""},
		{"top -n 3 -window 2s", 0, []string{"alice      2.5         500", "(nobody)", "4 users active in 2.0 s", "5 messages"}, ""},
		{"find alice", 0, []string{"g-1      s-1      live   2026-11-28T13:56:09Z", "2.0 KiB", "web", "g-2      s-2"}, ""},
		{"find nobody", 1, nil, "nobody has no session on g-1, and Redis names no other"},
		{"find lost", 1, []string{"Redis does not say where else: i/o timeout"}, "lost has no session on g-1"},
		{"find bad", 1, nil, "user_id: not one"},
		{"kick -reason gone alice -session s-1", 0, []string{"2 closed"}, ""},
		{"kick nobody", 1, nil, "nothing was closed"},
		{"kick refused", 1, nil, "this is not the token configured as admin.token (-token-file, or IM_ADMIN_TOKEN_FILE"},
		{"kick off", 1, nil, "no admin.token is configured"},
		{"log-level", 0, []string{"info"}, ""},
		{"log-level debug", 0, []string{"debug"}, ""},
		{"drain", 1, nil, "does not know this command"}, // this server has no Drain
	} {
		t.Run(tc.args, func(t *testing.T) {
			r := ctlWith(t, nil, nil, append(strings.Fields(tc.args), "-addr", addr)...)
			if r.code != tc.code || (r.stderr == "") != (tc.stderr == "") || !strings.Contains(r.stderr, tc.stderr) {
				t.Errorf("code %d, want %d with %q", r.code, tc.code, tc.stderr)
			}
			for _, want := range tc.stdout {
				if !strings.Contains(r.stdout, want) {
					t.Errorf("stdout lacks %q", want)
				}
			}
			if t.Failed() {
				t.Logf("stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
			}
		})
	}
	if k := o.kick; k.GetUserId() != "off" || o.top.GetLimit() != 3 || o.top.GetWindowMs() != 2000 {
		t.Errorf("asked for %v and %v", k, o.top)
	}
	ctlWith(t, nil, nil, "-addr", addr, "kick", "-reason", "gone away", "alice", "-session", "s-1")
	if k := o.kick; k.GetUserId() != "alice" || k.GetSessionId() != "s-1" || k.GetReason() != "gone away" {
		t.Errorf("asked for %v", k)
	}
}

func TestCtlJSON(t *testing.T) {
	addr := (&operator{}).listen(t)
	for args, want := range map[string]string{
		"ledger": `{"downstream":{"balanced":false,"ends":{"delivered":8},"in":9,"open":0},` +
			`"upstream":{"balanced":true,"ends":{"stored":7},"in":9007199254740000,"open":1}}`,
		"queues":     `{"queues":[{"bound":8192,"depth":0,"name":"user events","overflows":12,"unit":"records","when_full":"dropped"}]}`,
		"kick alice": `{"closed":2}`,
		"log-level":  `{"level":"info"}`,
		"find nobody": `{"elsewhere":[],"elsewhere_error":"","gateway_id":"g-1","sessions":[],` +
			`"user_id":"nobody"}`,
	} {
		r := ctlWith(t, nil, nil, append(strings.Fields(args), "-o", "json", "-addr", addr)...)
		var b strings.Builder
		dec := json.NewDecoder(strings.NewReader(r.stdout))
		dec.UseNumber()
		var v any
		if err := dec.Decode(&v); err != nil {
			t.Errorf("%s: %v in %s", args, err, r.stdout)
			continue
		}
		if err := json.NewEncoder(&b).Encode(v); err != nil || strings.TrimSpace(b.String()) != want {
			t.Errorf("%s: %s\nwant %s", args, b.String(), want)
		}
		if (r.code == 0) != (args != "find nobody") {
			t.Errorf("%s: code %d", args, r.code)
		}
	}
}

// TestCtlFindsItsWay: where the address and the token come from, the strongest first.
func TestCtlFindsItsWay(t *testing.T) {
	o := &operator{}
	addr := o.listen(t)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("token", "from-a-file\n")
	config := write("gateway.yaml", "grpc: {addr: \":"+port+"\", token: gateways}\nadmin: {token_file: "+write("t2", "of-the-config")+"}\nlog: {level: loud}\n")
	unreadable := write("unreadable.yaml", "grpc: {addr: \":"+port+"\", token_file: /none}\n")
	for _, tc := range []struct {
		name    string
		environ []string
		args    []string
		token   string
	}{
		{"no token", []string{"IM_GRPC_ADDR=" + addr}, nil, ""},
		{"gateways' token", []string{"IM_GRPC_ADDR=" + addr, "IM_GRPC_TOKEN=gw"}, nil, "Bearer gw"},
		{"operators' token", []string{"IM_GRPC_ADDR=" + addr, "IM_GRPC_TOKEN=gw", "IM_ADMIN_TOKEN=op"}, nil, "Bearer op"},
		{"operators' token in a file", []string{"IM_ADMIN_TOKEN_FILE=" + file}, []string{"-addr", addr}, "Bearer from-a-file"},
		{"file of the flag", []string{"IM_ADMIN_TOKEN=op", "IM_NONSENSE=1"}, []string{"-addr", addr, "-token-file", file}, "Bearer from-a-file"},
		{"file of the flag, the gateway's is not for us", nil, []string{"-config", unreadable, "-token-file", file}, "Bearer from-a-file"},
		// The rest of the configuration may be as bad as it likes.
		{"the gateway's configuration", nil, []string{"-config", config}, "Bearer of-the-config"},
	} {
		o.token = "not called"
		r := ctlWith(t, tc.environ, nil, append([]string{"status"}, tc.args...)...)
		if r.code != 0 || o.token != tc.token || r.stderr != "" {
			t.Errorf("%s: code %d, token %q, want %q; %s", tc.name, r.code, o.token, tc.token, r.stderr)
		}
	}
}

func TestCtlUsage(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"":                                "which command?",
		"frob":                            "there are status, ledger,",
		"status more":                     "1 arguments given, want: none",
		"find":                            "0 arguments given, want: USER",
		"log-level a b":                   "want: [LEVEL]",
		"status -o yaml":                  "must be text or json",
		"status -reason x":                "-reason", // a flag of kick's
		"status -timeout 0s":              "must be positive",
		"status -timeout soon":            "soon",
		"top -n 0":                        "must be 1 to 100",
		"top -n 4294967297":               "must be 1 to 100",
		"top -window 500us":               "must be 100ms to 30s",
		"status -token hunter2":           "every user of this machine can read flags",
		"-token=hunter2 status":           "every user of this machine can read flags",
		"status -token-file /none":        "-token-file: open /none",
		"status -token-file " + empty:     "the file is empty",
		"status -config /none":            "cannot be read",
		"status -tls-cert /x":             "-tls-cert and -tls-key",
		"status -tls-ca /none":            "read certificate authorities",
		"status -tls-cert /x -tls-key /y": "load certificate /x",
	} {
		r := ctlWith(t, nil, nil, strings.Fields(args)...)
		if r.code != exitUsage || r.stdout != "" || !strings.Contains(r.stderr, want) || strings.Contains(r.stderr, "hunter2") {
			t.Errorf("%q: code %d, stdout %q, stderr %q, want %q", args, r.code, r.stdout, r.stderr, want)
		}
	}
	for _, args := range []string{"-h", "help", "kick -h", "-h kick", "log-level --help"} {
		r := ctlWith(t, nil, nil, strings.Fields(args)...)
		if r.code != exitOK || !strings.Contains(r.stdout, "Usage:") || r.stderr != "" {
			t.Errorf("%q: code %d, %s", args, r.code, r.stderr)
		}
		for line := range strings.Lines(r.stdout) {
			if len(line) > 115 || strings.Contains(line, "%!") {
				t.Errorf("%q: %s", args, line)
			}
		}
	}
}

func TestCtlWithoutAGateway(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := ln.Addr().String()
	_ = ln.Close()
	if r := ctlWith(t, nil, nil, "status", "-addr", refused); r.code != exitFailed ||
		!strings.Contains(r.stderr, "no gateway can be reached at "+refused) || !strings.Contains(r.stderr, "connection refused") {
		t.Errorf("code %d: %s", r.code, r.stderr)
	}
	plain := (&operator{}).listen(t)
	if r := ctlWith(t, nil, nil, "status", "-addr", plain, "-tls"); r.code != exitFailed || !strings.Contains(r.stderr, "TLS") {
		t.Errorf("TLS to a plain port: code %d: %s", r.code, r.stderr)
	}
	o := &operator{slow: make(chan struct{})}
	if r := ctlWith(t, nil, nil, "log-level", "-addr", o.listen(t), "-timeout", "50ms"); r.code != exitFailed || !strings.Contains(r.stderr, "has not answered in time") {
		t.Errorf("a slow one: code %d: %s", r.code, r.stderr)
	}
	o = &operator{slow: make(chan struct{})}
	signals := make(chan os.Signal, 1)
	go func() {
		<-o.slow
		signals <- syscall.SIGINT
	}()
	if r := ctlWith(t, nil, signals, "log-level", "-addr", o.listen(t), "-timeout", time.Minute.String()); r.code != exitFailed || !strings.Contains(r.stderr, "interrupted") {
		t.Errorf("interrupted: code %d: %s", r.code, r.stderr)
	}
}
