package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"im-gateway/codec"
	"im-gateway/codec/logicpb"
)

// fakeAuth is an im-logic whose login does what the test says.
type fakeAuth struct {
	logicpb.UnimplementedAuthServiceServer
	login  func(context.Context, *logicpb.LoginRequest) (*logicpb.TokenResponse, error)
	logout func(context.Context, *logicpb.LogoutRequest) (*logicpb.LogoutResponse, error)
	calls  chan string // names of the methods called, when it is not nil
}

func (f *fakeAuth) called(name string) {
	if f.calls != nil {
		f.calls <- name
	}
}

func (f *fakeAuth) Register(_ context.Context, r *logicpb.RegisterRequest) (*logicpb.RegisterResponse, error) {
	f.called("Register")
	if r.GetUsername() == "taken" {
		return nil, status.Error(codes.AlreadyExists, "the name is taken")
	}
	return &logicpb.RegisterResponse{User: &logicpb.User{UserId: "u-1", Username: r.GetUsername()}}, nil
}

func (f *fakeAuth) Login(ctx context.Context, r *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
	f.called("Login")
	if f.login != nil {
		return f.login(ctx, r)
	}
	if r.GetPassword() != "right" {
		return nil, status.Error(codes.Unauthenticated, "wrong user name or password")
	}
	return tokens(r.GetUsername()), nil
}

func (f *fakeAuth) GuestLogin(_ context.Context, r *logicpb.GuestLoginRequest) (*logicpb.TokenResponse, error) {
	return tokens(r.GetGuestName()), nil
}

func (f *fakeAuth) RefreshToken(_ context.Context, r *logicpb.RefreshTokenRequest) (*logicpb.TokenResponse, error) {
	return &logicpb.TokenResponse{Token: "t2", RefreshToken: r.GetRefreshToken() + "+"}, nil
}

func (f *fakeAuth) Logout(ctx context.Context, r *logicpb.LogoutRequest) (*logicpb.LogoutResponse, error) {
	f.called("Logout")
	if f.logout != nil {
		return f.logout(ctx, r)
	}
	return &logicpb.LogoutResponse{}, nil
}

func tokens(user string) *logicpb.TokenResponse {
	return &logicpb.TokenResponse{
		Token: "t", RefreshToken: "r", ExpiresAt: 1760000000123,
		User: &logicpb.User{UserId: "u-1", Username: user, Avatar: "https://a.example/<x>"},
	}
}

// logicConn serves auth in this process and returns the real client connection to it.
func logicConn(t *testing.T, auth *fakeAuth) *grpc.ClientConn {
	t.Helper()
	ln := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	logicpb.RegisterAuthServiceServer(server, auth)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	conn, err := NewLogic(LogicOptions{Target: "passthrough:///im-logic", DialOptions: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		<-served
	})
	return conn
}

// publisherFunc is a Publisher.
type publisherFunc func(context.Context, string, []byte) (Published, error)

func (f publisherFunc) Publish(ctx context.Context, from Caller, frame []byte) (Published, error) {
	return f(ctx, from.User, frame)
}

// testAPI returns an API whose options the test may change before it is made.
func testAPI(t *testing.T, auth *fakeAuth, change func(*APIOptions)) *API {
	t.Helper()
	o := APIOptions{
		Settings: APISettings{
			AuthDeadline: 5 * time.Second, MaxMessageBytes: 1 << 20, MaxBodyBytes: DefaultMaxBodyBytes, MaxRequests: 16,
		},
		Auth: logicpb.NewAuthServiceClient(logicConn(t, auth)),
		Authenticate: func(r *http.Request) (Caller, error) {
			switch r.Header.Get("Authorization") {
			case "Bearer good":
				return Caller{User: "alice"}, nil
			case "Bearer old":
				return Caller{}, fmt.Errorf("bearer: %w", ErrTokenExpired)
			}
			return Caller{}, errors.New("no token")
		},
		Publisher: publisherFunc(func(_ context.Context, _ string, _ []byte) (Published, error) {
			return Published{}, errors.New("not expected")
		}),
		PublishDeadline: 5 * time.Second,
		UpstreamTopic:   "up",
		Logger:          zerolog.Nop(),
		Registerer:      prometheus.NewRegistry(),
	}
	if change != nil {
		change(&o)
	}
	a, err := NewAPI(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// do sends one request; header lines are "Name: value".
func do(a http.Handler, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	return w
}

func TestAPIAuth(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	for _, tc := range []struct {
		name, path, body string
		status           int
		want             string
	}{
		{"register", "register", `{"username":"al","password":"p"}`, 200,
			`{"success":true,"data":{"user":{"avatar":"","userId":"u-1","username":"al"}}}`},
		{"login", "login", `{"username":"al","password":"right"}`, 200,
			`{"success":true,"data":{"expiresAt":1760000000123,"refreshToken":"r","token":"t",` +
				`"user":{"avatar":"https://a.example/\u003cx\u003e","userId":"u-1","username":"al"}}}`},
		{"guest camel", "guest", `{"guestName":"g"}`, 200, `"username":"g"`},
		{"guest snake", "guest", `{"guest_name":"g"}`, 200, `"username":"g"`},
		{"refresh without user", "refresh", `{"refreshToken":"r"}`, 200,
			`{"success":true,"data":{"expiresAt":0,"refreshToken":"r+","token":"t2","user":null}}`},
		{"logout", "logout", `{"refresh_token":"r"}`, 200, `{"success":true,"data":{}}`},
		{"unknown fields", "login", ` {"username":"al","password":"right","x":{"y":[1]},"User":3} `, 200, `"token":"t"`},
		{"wrong password", "login", `{"username":"al","password":"no"}`, 401,
			`{"success":false,"code":"UNAUTHENTICATED","message":"wrong user name or password"}`},
		{"taken", "register", `{"username":"taken","password":"p"}`, 409, `"code":"ALREADY_EXISTS"`},
		{"missing one", "login", `{"username":"al"}`, 422,
			`{"success":false,"code":"MISSING_FIELD","message":"missing: password"}`},
		{"missing all", "login", `{}`, 422, `"message":"missing: username, password"`},
		{"empty", "login", `{"username":"","password":null}`, 422, `missing: username, password`},
		{"missing guest name", "guest", `{"name":"x"}`, 422, `missing: guestName`},
		{"both spellings", "guest", `{"guestName":"g","guest_name":"h"}`, 400, `guestName is given twice`},
		{"repeated", "login", `{"username":"a","username":"b","password":"right"}`, 400, `INVALID_JSON`},
		{"wrong type", "login", `{"username":7,"password":"p"}`, 400, `username must be a string`},
		{"no body", "login", ``, 400, `INVALID_JSON`},
		{"cut off", "login", `{"username":"al","pass`, 400, `INVALID_JSON`},
		{"trailing", "login", `{"username":"al","password":"right"}x`, 400, `INVALID_JSON`},
		{"array", "login", `[]`, 400, `INVALID_JSON`},
		{"null", "login", `null`, 400, `INVALID_JSON`},
		{"not UTF-8", "login", "{\"username\":\"a\xff\",\"password\":\"right\"}", 400, `INVALID_JSON`},
		{"deep", "login", strings.Repeat("[", 60000), 400, `INVALID_JSON`},
		{"64 KiB", "login", `{"username":"al","password":"right","x":"` + strings.Repeat("x", DefaultMaxBodyBytes-43) + `"}`, 200, `token`},
		{"over 64 KiB", "login", `{"username":"al","password":"right","x":"` + strings.Repeat("x", DefaultMaxBodyBytes-42) + `"}`, 413,
			`"code":"BODY_TOO_LARGE"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := do(a, "POST", "/api/auth/"+tc.path, tc.body, "Content-Type: text/plain")
			if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.want) {
				t.Errorf("%d %s, want %d with %s", w.Code, w.Body, tc.status, tc.want)
			}
			if !json.Valid(w.Body.Bytes()) || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("the answer is not JSON: %v %s", w.Header(), w.Body)
			}
		})
	}
	if n := testutil.ToFloat64(a.routes["/api/auth/guest"].counts[2]); n != 2 {
		t.Errorf("%v requests to guest counted as 2xx, want 2", n)
	}
}

func TestAPIStatusMapping(t *testing.T) {
	auth := &fakeAuth{}
	a := testAPI(t, auth, nil)
	for code, want := range map[codes.Code]int{
		codes.Canceled: 499, codes.Unknown: 500, codes.InvalidArgument: 400, codes.DeadlineExceeded: 504,
		codes.NotFound: 404, codes.AlreadyExists: 409, codes.PermissionDenied: 403, codes.ResourceExhausted: 429,
		codes.FailedPrecondition: 400, codes.Aborted: 409, codes.OutOfRange: 400, codes.Unimplemented: 501,
		codes.Internal: 500, codes.Unavailable: 503, codes.DataLoss: 500, codes.Unauthenticated: 401,
	} {
		auth.login = func(context.Context, *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
			s, err := status.New(code, "from db-7.internal").WithDetails(
				&errdetails.RetryInfo{RetryDelay: durationpb.New(2500 * time.Millisecond)})
			if err != nil {
				t.Error(err)
			}
			return nil, s.Err()
		}
		w := do(a, "POST", "/api/auth/login", `{"username":"a","password":"p"}`)
		if w.Code != want {
			t.Errorf("%s: %d, want %d", code, w.Code, want)
		}
		if want >= 500 && strings.Contains(w.Body.String(), "db-7") {
			t.Errorf("%s: the answer shows our insides: %s", code, w.Body)
		}
		if retry := w.Header().Get("Retry-After"); (retry == "3") != (want == 503 || want == 429) {
			t.Errorf("%s: Retry-After %q", code, retry)
		}
	}
}

func TestAPILogicAway(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close() // nobody listens there now
	conn, err := NewLogic(LogicOptions{Target: ln.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a := testAPI(t, &fakeAuth{}, func(o *APIOptions) { o.Auth = logicpb.NewAuthServiceClient(conn) })
	w := do(a, "POST", "/api/auth/login", `{"username":"a","password":"p"}`)
	if w.Code != 503 || w.Header().Get("Retry-After") != "1" || strings.Contains(w.Body.String(), "127.0.0.1") {
		t.Errorf("%d %v %s, want 503 with Retry-After and no address", w.Code, w.Header(), w.Body)
	}
}

func TestAPILogicSlow(t *testing.T) {
	auth := &fakeAuth{login: func(ctx context.Context, _ *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}}
	a := testAPI(t, auth, func(o *APIOptions) { o.Settings.AuthDeadline = 20 * time.Millisecond })
	w := do(a, "POST", "/api/auth/login", `{"username":"a","password":"p"}`)
	if w.Code != 504 || !strings.Contains(w.Body.String(), "DEADLINE_EXCEEDED") {
		t.Errorf("%d %s, want 504", w.Code, w.Body)
	}
}

func TestAPIMethods(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	for _, tc := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/api/auth/login", 405, "POST, OPTIONS"},
		{"HEAD", "/api/auth/login", 405, "POST, OPTIONS"},
		{"DELETE", "/healthz", 405, "GET, HEAD, OPTIONS"},
		{"OPTIONS", "/healthz", 204, "GET, HEAD, OPTIONS"},
		{"OPTIONS", "/api/auth/login", 204, "POST, OPTIONS"},
		{"HEAD", "/healthz", 200, ""},
		{"GET", "/healthz", 200, ""},
		{"GET", "/ws", 426, ""},
		{"POST", "/ws", 405, "GET, HEAD, OPTIONS"},
		{"GET", "/", 404, ""},
		{"POST", "/api/auth/login/", 404, ""},
		{"POST", "/api//auth/login", 404, ""},
		{"POST", "/api/auth/../auth/login", 404, ""},
	} {
		w := do(a, tc.method, tc.path, "")
		if w.Code != tc.status || w.Header().Get("Allow") != tc.allow {
			t.Errorf("%s %s: %d, Allow %q, want %d %q", tc.method, tc.path, w.Code, w.Header().Get("Allow"), tc.status, tc.allow)
		}
		if body := w.Body.String(); (body == "") != (tc.method == "HEAD" || tc.status == 204) {
			t.Errorf("%s %s: body %q", tc.method, tc.path, body)
		}
	}
}

func TestAPICORS(t *testing.T) {
	const origin = "https://chat.example"
	one := testAPI(t, &fakeAuth{}, func(o *APIOptions) { o.Settings.Origins = []string{origin} })
	every := testAPI(t, &fakeAuth{}, func(o *APIOptions) { o.Settings.Origins = []string{"*"} })
	none := testAPI(t, &fakeAuth{}, nil)
	for _, tc := range []struct {
		name    string
		api     *API
		origin  string
		allowed string
	}{
		{"configured", one, origin, origin},
		{"other", one, "https://evil.example", ""},
		{"suffix", one, origin + ".evil.example", ""},
		{"null", one, "null", ""},
		{"every", every, "https://evil.example", "*"},
		{"none", none, origin, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := do(tc.api, "OPTIONS", "/api/auth/login", "", "Origin: "+tc.origin, "Access-Control-Request-Method: POST",
				"Access-Control-Request-Headers: content-type")
			h := w.Header()
			if w.Code != 204 || h.Get("Access-Control-Allow-Origin") != tc.allowed {
				t.Errorf("preflight: %d %v", w.Code, h)
			}
			if (h.Get("Access-Control-Allow-Methods") == "POST") != (tc.allowed != "") {
				t.Errorf("preflight: methods %q", h.Get("Access-Control-Allow-Methods"))
			}
			w = do(tc.api, "POST", "/api/auth/login", "{}", "Origin: "+tc.origin)
			if w.Code != 422 || w.Header().Get("Access-Control-Allow-Origin") != tc.allowed {
				t.Errorf("request: %d %v", w.Code, w.Header())
			}
		})
	}
}

func TestAPIMessages(t *testing.T) {
	for _, tc := range []struct {
		name   string
		token  string
		body   string
		answer Published
		err    error
		status int
		want   string
	}{
		{"stored", "good", `{"type":"x"}`, Published{ClientMsgID: "c-1",
			Result: codec.UpstreamResult{MessageID: "01J", Partition: 3, Offset: 12}}, nil, 200,
			`{"success":true,"data":{"client_msg_id":"c-1","message_id":"01J","topic":"up","partition":3,"offset":12}}`},
		{"offset 0", "good", `{}`, Published{Result: codec.UpstreamResult{Offset: 0}}, nil, 200, `"offset":0`},
		{"offset not known", "good", `{}`, Published{Result: codec.UpstreamResult{MessageID: "m", Offset: -1}}, nil, 200,
			`{"success":true,"data":{"message_id":"m","topic":"up","partition":0}}`},
		{"no token", "bad", `{}`, Published{}, nil, 401, `"code":"AUTH_FAILED"`},
		{"expired", "old", `{}`, Published{}, nil, 401, `"code":"TOKEN_EXPIRED"`},
		{"too large", "good", strings.Repeat("x", DefaultMaxBodyBytes+1), Published{}, nil, 413, `"code":"MESSAGE_TOO_LARGE"`},
		{"invalid", "good", `x`, Published{Message: "not JSON", Result: codec.UpstreamResult{Code: codec.InvalidMessage}}, nil, 400,
			`{"success":false,"code":"INVALID_MESSAGE","message":"not JSON"}`},
		{"overloaded", "good", `{}`, Published{Result: codec.UpstreamResult{Code: codec.Overloaded, RetryAfterMS: 1500}}, nil, 503,
			`"code":"OVERLOADED"`},
		{"broker", "good", `{}`, Published{Result: codec.UpstreamResult{Code: codec.BrokerUnavailable}}, nil, 503, `BROKER_UNAVAILABLE`},
		{"limited", "good", `{}`, Published{Result: codec.UpstreamResult{Code: codec.RateLimited}}, nil, 429, `RATE_LIMITED`},
		{"unknown", "good", `{}`, Published{Result: codec.UpstreamResult{Code: codec.OutcomeUnknown}}, nil, 504, `OUTCOME_UNKNOWN`},
		{"error", "good", `{}`, Published{}, context.DeadlineExceeded, 504, `OUTCOME_UNKNOWN`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := testAPI(t, &fakeAuth{}, func(o *APIOptions) {
				o.Publisher = publisherFunc(func(_ context.Context, user string, frame []byte) (Published, error) {
					if user != "alice" || string(frame) != tc.body {
						t.Errorf("published %s as %s", frame, user)
					}
					return tc.answer, tc.err
				})
			})
			w := do(a, "POST", "/api/messages", tc.body, "Authorization: Bearer "+tc.token)
			if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.want) {
				t.Errorf("%d %s, want %d with %s", w.Code, w.Body, tc.status, tc.want)
			}
			if retry := w.Header().Get("Retry-After"); (retry != "") != (tc.status == 503 || tc.status == 429) {
				t.Errorf("Retry-After %q", retry)
			}
			if (w.Header().Get("WWW-Authenticate") != "") != (tc.status == 401) {
				t.Errorf("WWW-Authenticate %q", w.Header().Get("WWW-Authenticate"))
			}
		})
	}
}

// callerPublisher is a Publisher that sees all of the caller.
type callerPublisher func(Caller) Published

func (f callerPublisher) Publish(_ context.Context, from Caller, _ []byte) (Published, error) {
	return f(from), nil
}

// TestAPISession: session_id reaches the publisher, and what the session did itself is answered as that.
func TestAPISession(t *testing.T) {
	for _, tc := range []struct {
		name, query, session string
		answer               Published
		status               int
		want                 string
	}{
		{"none", "?session_id=", "", Published{Result: codec.UpstreamResult{MessageID: "m"}}, 200, `"message_id":"m"`},
		{"done", "?session_id=s-1", "s-1", Published{Control: true}, 200, `{"success":true,"data":{}}`},
		{"a new token", "?session_id=s-1", "s-1", Published{Control: true, ExpiresAt: 7}, 200, `{"success":true,"data":{"expires_at":7}}`},
		{"refused", "?session_id=s-1", "s-1", Published{Control: true, Message: "why", Result: codec.UpstreamResult{Code: codec.AuthFailed}}, 401,
			`{"success":false,"code":"AUTH_FAILED","message":"why"}`},
		{"not found", "?device_id=d&session_id=s%201", "s 1", Published{Result: codec.UpstreamResult{Code: codec.SessionNotFound}}, 404,
			`"code":"SESSION_NOT_FOUND","message":"this gateway has no such session`},
	} {
		a := testAPI(t, &fakeAuth{}, func(o *APIOptions) {
			o.Publisher = callerPublisher(func(from Caller) Published {
				if from.User != "alice" || from.Session != tc.session {
					t.Errorf("%s: published for %+v", tc.name, from)
				}
				return tc.answer
			})
		})
		w := do(a, "POST", "/api/messages"+tc.query, `{"type":"m","data":1}`, "Authorization: Bearer good")
		if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.want) {
			t.Errorf("%s: %d %s, want %d with %s", tc.name, w.Code, w.Body, tc.status, tc.want)
		}
	}
}

func TestAPIRequestLimit(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	auth := &fakeAuth{login: func(context.Context, *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
		entered <- struct{}{}
		<-leave
		return tokens("a"), nil
	}}
	a := testAPI(t, auth, func(o *APIOptions) { o.Settings.MaxRequests = 1 })
	first := make(chan int)
	go func() { first <- do(a, "POST", "/api/auth/login", `{"username":"a","password":"p"}`).Code }()
	<-entered
	if w := do(a, "POST", "/api/auth/login", `{}`); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("a request too many: %d %v", w.Code, w.Header())
	}
	if w := do(a, "GET", "/healthz", ""); w.Code != 200 {
		t.Errorf("/healthz under load: %d", w.Code)
	}
	close(leave)
	if code := <-first; code != 200 {
		t.Errorf("the first request: %d", code)
	}
	if n := testutil.ToFloat64(a.refused); n != 1 {
		t.Errorf("%v refused requests counted, want 1", n)
	}
}

// TestAPIRequestID also holds that nothing secret is logged.
func TestAPIRequestID(t *testing.T) {
	var log strings.Builder
	ids := make(chan []string, 1)
	auth := &fakeAuth{login: func(ctx context.Context, _ *logicpb.LoginRequest) (*logicpb.TokenResponse, error) {
		ids <- metadata.ValueFromIncomingContext(ctx, "x-request-id")
		return nil, status.Error(codes.Internal, "broken")
	}}
	a := testAPI(t, auth, func(o *APIOptions) { o.Logger = zerolog.New(&log) })
	for _, tc := range []struct {
		given string
		kept  bool
	}{{"req-1", true}, {"", false}, {strings.Repeat("x", 65), false}, {"a b", false}, {"<script>", false}} {
		w := do(a, "POST", "/api/auth/login?token=hunter1", `{"username":"alice","password":"hunter2"}`, "X-Request-Id: "+tc.given,
			"Authorization: Bearer hunter3")
		got := w.Header().Get("X-Request-Id")
		if (got == tc.given) != tc.kept || got == "" {
			t.Errorf("id %q became %q", tc.given, got)
		}
		if at := <-ids; len(at) != 1 || at[0] != got {
			t.Errorf("im-logic was given the id %v, want %q", at, got)
		}
		if !strings.Contains(log.String(), got) {
			t.Errorf("the log lacks the id %q", got)
		}
	}
	if strings.Contains(log.String(), "hunter") || !strings.Contains(log.String(), `"status":500`) {
		t.Errorf("log: %s", log.String())
	}
}

func TestAPIPanic(t *testing.T) {
	var log strings.Builder
	a := testAPI(t, &fakeAuth{}, func(o *APIOptions) {
		o.Logger = zerolog.New(&log)
		o.Publisher = publisherFunc(func(context.Context, string, []byte) (Published, error) { panic("boom") })
	})
	w := do(a, "POST", "/api/messages", "{}", "Authorization: Bearer good")
	if w.Code != 500 || strings.Contains(w.Body.String(), "boom") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if n := a.serving.Load(); n != 0 {
		t.Errorf("%d requests count as being served", n)
	}
	if n := testutil.ToFloat64(a.panics); n != 1 || !strings.Contains(log.String(), `"stack":"goroutine `) {
		t.Errorf("%v panics counted: %s", n, log.String())
	}
}

// TestAPISettings: limits and origins change for the requests that come next, while others are served.
func TestAPISettings(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 2)
	a := testAPI(t, &fakeAuth{}, func(o *APIOptions) {
		o.Settings.MaxRequests = 1
		o.Publisher = publisherFunc(func(context.Context, string, []byte) (Published, error) {
			held <- struct{}{}
			<-hold
			return Published{}, nil
		})
	})
	alter := func(change func(*APISettings)) {
		t.Helper()
		next := a.rules.Load().APISettings
		change(&next)
		apply, err := a.Prepare(next)
		if err != nil {
			t.Fatal(err)
		}
		apply()
	}
	post := func() int { return do(a, "POST", "/api/messages", "{}", "Authorization: Bearer good").Code }
	codes := make(chan int, 2)
	go func() { codes <- post() }()
	<-held
	if code := post(); code != 503 {
		t.Errorf("beyond the bound: %d", code)
	}
	alter(func(n *APISettings) { n.MaxRequests = 2 })
	go func() { codes <- post() }()
	<-held
	alter(func(n *APISettings) { n.MaxRequests, n.MaxBodyBytes = 1, 10 })
	if code := post(); code != 503 {
		t.Errorf("beyond the bound again: %d", code)
	}
	close(hold)
	for range 2 {
		if code := <-codes; code != 200 {
			t.Errorf("a request under way was answered %d", code)
		}
	}
	if code := do(a, "POST", "/api/auth/guest", `{"guestName":"carl"}`).Code; code != 413 {
		t.Errorf("a body of 20 bytes: %d", code)
	}
	for _, origins := range [][]string{nil, {"https://a.example"}, {"https://b.example"}, {"*"}} {
		alter(func(n *APISettings) { n.Origins = origins })
		got := do(a, "GET", "/healthz", "", "Origin: https://a.example").Header().Get("Access-Control-Allow-Origin")
		want := map[string]string{"https://a.example": "https://a.example", "*": "*"}[strings.Join(origins, "")]
		if got != want {
			t.Errorf("origins %v: %q, want %q", origins, got, want)
		}
	}
	if _, err := a.Prepare(APISettings{MaxRequests: 0, MaxBodyBytes: 1}); err == nil {
		t.Error("no requests at all were taken as a setting")
	}
}

// TestAPIOverHTTP sends what a recorder cannot: chunks, Expect, two requests at once, an endless body.
func TestAPIOverHTTP(t *testing.T) {
	server := httptest.NewServer(testAPI(t, &fakeAuth{}, nil))
	defer server.Close()
	for _, tc := range []struct {
		name, request, want string
	}{
		{"chunked", "POST /api/auth/guest HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" +
			"3\r\n{\"g\r\n11\r\nuestName\":\"carl\"}\r\n0\r\n\r\n", "carl"},
		{"expect", "POST /api/auth/guest HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n" +
			"{\"guestName\":\"cy\"}", "cy"},
		{"pipelined", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", "NOT_FOUND"},
		{"declared too large", "POST /api/auth/guest HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", "BODY_TOO_LARGE"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, tc.request); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(conn)
			for lines.Scan() {
				if strings.Contains(lines.Text(), tc.want) {
					return
				}
			}
			t.Errorf("no %s in the answer: %v", tc.want, lines.Err())
		})
	}
}

func TestBodyLimit(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, func(o *APIOptions) { o.Settings.MaxBodyBytes = 100 })
	body := func(n int) string {
		return `{"username":"al","password":"right","x":"` + strings.Repeat("x", n-43) + `"}`
	}
	if w := do(a, http.MethodPost, "/api/auth/login", body(100)); w.Code != 200 {
		t.Errorf("at the limit: %d %s", w.Code, w.Body)
	}
	if w := do(a, http.MethodPost, "/api/auth/login", body(101)); w.Code != 413 {
		t.Errorf("over the limit: %d %s", w.Code, w.Body)
	}
	r := httptest.NewRequest(http.MethodPost, "/api/auth/login", strings.NewReader(body(101)))
	r.ContentLength = -1 // in chunks
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	if w.Code != 413 {
		t.Errorf("over the limit in chunks: %d %s", w.Code, w.Body)
	}
	if n := testutil.ToFloat64(a.tooLarge); n != 2 {
		t.Errorf("%v counted", n)
	}
}

func TestPublishDeviceName(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	for _, id := range []string{strings.Repeat("d", codec.MaxNameLen+1), "a%00b", "%ff"} {
		w := do(a, http.MethodPost, "/api/messages?device_id="+id, `{"type":"m","data":1}`, "Authorization: Bearer good")
		if w.Code != 400 || !strings.Contains(w.Body.String(), "device_id") {
			t.Errorf("device %q: %d %s", id, w.Code, w.Body)
		}
	}
}
