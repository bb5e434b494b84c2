package adminpage

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/status"

	"im-gateway/codec/gatewaypb"
)

//go:embed static templates
var files embed.FS

// policy lets the page load its own files only, and nobody put it into a frame.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// page serves / and /page/. Any goroutine may call its methods.
type page struct {
	service   gatewaypb.AdminServiceServer
	templates *template.Template
	log       zerolog.Logger
}

// New returns the handler of GET / and of all GETs below /page/.
func New(service gatewaypb.AdminServiceServer, log zerolog.Logger) (http.Handler, error) {
	templates, err := template.New("").Funcs(functions).ParseFS(files, "templates/*.html")
	if err != nil {
		return nil, fmt.Errorf("admin page: %w", err)
	}
	static, err := fs.Sub(files, "static")
	if err != nil {
		return nil, fmt.Errorf("admin page: %w", err)
	}
	p := &page{service: service, templates: templates, log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.index)
	mux.HandleFunc("GET /page/live", p.live)
	mux.HandleFunc("GET /page/talkers", p.talkers)
	mux.HandleFunc("GET /page/user", p.user)
	mux.Handle("GET /page/", http.StripPrefix("/page/", http.FileServerFS(static)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	}), nil
}

// view is what the templates show.
type view struct {
	Status  *gatewaypb.StatusResponse
	Ledger  *gatewaypb.LedgerResponse
	Queues  *gatewaypb.QueuesResponse
	Talkers *gatewaypb.TopTalkersResponse // nil: not measured
	User    string                        // that was asked for
	Found   *gatewaypb.FindUserResponse   // nil: not asked for, or Problem
	Problem string                        // why there is no answer
	Levels  []string
}

// look reads what the live parts show.
func (p *page) look(ctx context.Context) (v view, err error) {
	if v.Status, err = p.service.Status(ctx, &gatewaypb.StatusRequest{}); err != nil {
		return v, err
	}
	if v.Ledger, err = p.service.Ledger(ctx, &gatewaypb.LedgerRequest{}); err != nil {
		return v, err
	}
	v.Queues, err = p.service.Queues(ctx, &gatewaypb.QueuesRequest{})
	return v, err
}

// find looks for the user in the query, if there is one.
func (p *page) find(r *http.Request, v *view) {
	if v.User = r.URL.Query().Get("user"); v.User == "" {
		return
	}
	found, err := p.service.FindUser(r.Context(), &gatewaypb.FindUserRequest{UserId: v.User})
	if err != nil {
		v.Problem = status.Convert(err).Message()
		return
	}
	v.Found = found
}

func (p *page) index(w http.ResponseWriter, r *http.Request) {
	v, err := p.look(r.Context())
	if err != nil {
		p.fail(w, err)
		return
	}
	v.Levels = []string{"trace", "debug", "info", "warn", "error"}
	p.find(r, &v)
	p.render(w, "page", v)
}

func (p *page) live(w http.ResponseWriter, r *http.Request) {
	v, err := p.look(r.Context())
	if err != nil {
		p.fail(w, err)
		return
	}
	p.render(w, "live", v)
}

// talkers answers when it has measured.
func (p *page) talkers(w http.ResponseWriter, r *http.Request) {
	talkers, err := p.service.TopTalkers(r.Context(), &gatewaypb.TopTalkersRequest{})
	if err != nil {
		p.fail(w, err)
		return
	}
	p.render(w, "talkers", view{Talkers: talkers})
}

func (p *page) user(w http.ResponseWriter, r *http.Request) {
	v := view{}
	p.find(r, &v)
	if v.User == "" {
		v.Problem = "name a user"
	}
	p.render(w, "found", v)
}

// render sends a whole answer or none: a template that fails in its middle leaves no half page.
func (p *page) render(w http.ResponseWriter, name string, v view) {
	var b bytes.Buffer
	if err := p.templates.ExecuteTemplate(&b, name, v); err != nil {
		p.log.Error().Err(err).Str("template", name).Msg("admin page not rendered")
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes()) // who asked may be gone
}

func (p *page) fail(w http.ResponseWriter, err error) {
	http.Error(w, status.Convert(err).Message(), http.StatusServiceUnavailable)
}
