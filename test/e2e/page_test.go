package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"im-gateway/cmd/im-dev/page"
)

// wire is a TCP proxy whose connections can be cut.
type wire struct {
	ln net.Listener
	to string

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]bool
}

func newWire(t *testing.T, to string) *wire {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{ln: ln, to: to, conns: map[net.Conn]bool{}}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go w.carry(c)
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		w.set(true)
	})
	return w
}

func (w *wire) carry(a net.Conn) {
	defer func() { _ = a.Close() }()
	b, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer func() { _ = b.Close() }()
	w.mu.Lock()
	if w.cut {
		w.mu.Unlock()
		return
	}
	w.conns[a], w.conns[b] = true, true
	w.mu.Unlock()
	done := make(chan struct{}, 2)
	pump := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // ends when either side does
		done <- struct{}{}
	}
	go pump(a, b)
	go pump(b, a)
	<-done
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, a)
	delete(w.conns, b)
}

// set cuts every connection and refuses new ones, or carries again.
func (w *wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
	if cut {
		for c := range w.conns {
			_ = c.Close()
		}
	}
}

// tab is one tab of a page.
type tab struct {
	t   *testing.T
	ctx context.Context
}

// chromium starts a browser.
func chromium(t *testing.T) context.Context {
	t.Helper()
	opts := append([]chromedp.ExecAllocatorOption{}, chromedp.DefaultExecAllocatorOptions[:]...)
	opts = append(opts, chromedp.NoSandbox, chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true), chromedp.UserDataDir(t.TempDir()))
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	t.Cleanup(cancel)
	browser, stop := chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(stop)
	browser, stop = chromedp.NewContext(browser)
	t.Cleanup(stop)
	if err := chromedp.Do(browser, chromedp.Navigate("about:blank")); err != nil {
		t.Fatalf("start Chromium (apt-get install chromium): %v", err)
	}
	return browser
}

func newTab(t *testing.T, browser context.Context, url string) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(browser)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx, chromedp.Navigate(url)); err != nil {
		t.Fatal(err)
	}
	return &tab{t, ctx}
}

// is polls a JavaScript condition.
func (p *tab) is(what, condition string) {
	p.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool]("Boolean("+condition+")"))
		if err == nil && ok {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			text, _ := chromedp.Run(p.ctx, chromedp.Evaluate[string]("document.body.innerText"))
			p.t.Fatalf("it did not come true: %s (%v); the page says:\n%s", what, err, text)
		}
	}
}

func (p *tab) do(script string) {
	p.t.Helper()
	if _, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool]("("+script+", true)")); err != nil {
		p.t.Fatalf("%s: %v", script, err)
	}
}

func (p *tab) fill(id, text string) {
	p.t.Helper()
	p.do(fmt.Sprintf(`(e => { e.value = %q; e.dispatchEvent(new Event("input", {bubbles: true})); })(document.getElementById(%q))`, text, id))
}

func (p *tab) click(id string) {
	p.t.Helper()
	p.do(fmt.Sprintf(`document.getElementById(%q).click()`, id))
}

// state polls for a message's state: pending, acked, delivered or received.
func (p *tab) state(text, state string) {
	p.t.Helper()
	p.is(text+" is "+state, fmt.Sprintf(
		`[...document.querySelectorAll('[data-testid=message]')].some(m => m.innerText.includes(%q) && m.dataset.state === %q)`, text, state))
}

func (p *tab) register(name string) {
	p.t.Helper()
	p.is("the sign-in form", `document.getElementById("username")`)
	p.fill("username", name)
	p.fill("password", hide("page-password-"+name))
	p.click("register")
	p.is(name+" is online", `document.getElementById("connection").dataset.state === "online"`)
}

// login signs in a user who has registered.
func (p *tab) login(name string) {
	p.t.Helper()
	p.is("the sign-in form or the chat", `document.getElementById("username") || document.getElementById("connection")`)
	if online, err := chromedp.Run(p.ctx, chromedp.Evaluate[bool](`document.getElementById("connection")?.dataset.state === "online"`)); err != nil || !online {
		p.fill("username", name)
		p.fill("password", "page-password-"+name)
		p.click("login")
	}
	p.is(name+" is online", `document.getElementById("connection").dataset.state === "online"`)
}

func (p *tab) say(text string) {
	p.t.Helper()
	p.fill("message-input", text)
	p.click("send")
}

// TestPageInChromium: two people chat in two tabs; one loses its connection, sends meanwhile, reloads
// the page, and comes back with what it missed.
func TestPageInChromium(t *testing.T) {
	site := httptest.NewUnstartedServer(nil)
	origin := "http://" + site.Listener.Addr().String()
	g := start(t, user("gw"), settings{"http.cors_origins": origin, "sessions.policy": "allow:3"})
	link := newWire(t, g.addr)
	handler, err := page.New(page.Options{Gateways: []string{"http://" + link.ln.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	site.Config.Handler = handler
	site.Start()
	t.Cleanup(site.Close)
	browser := chromium(t)
	alice, bob := newTab(t, browser, origin+"/"), newTab(t, browser, origin+"/")
	a, b := user("anna"), user("bert")
	alice.register(a)
	bob.register(b)
	alice.fill("new-chat-user", b)
	alice.click("new-chat")
	alice.say("hello bert")
	alice.state("hello bert", "delivered")
	bob.is("the conversation", `document.querySelector('[data-testid=conversation]')`)
	bob.do(`document.querySelector('[data-testid=conversation]').click()`)
	bob.state("hello bert", "received")

	// The same account in two more tabs: each shows what the others send.
	second, third := newTab(t, browser, origin+"/"), newTab(t, browser, origin+"/")
	second.login(a)
	third.login(a)
	for _, p := range []*tab{second, third} {
		p.is("the conversation", `document.querySelector('[data-testid=conversation]')`)
		p.do(`document.querySelector('[data-testid=conversation]').click()`)
		p.state("hello bert", "delivered")
	}
	second.say("from the second tab")
	for _, p := range []*tab{alice, second, third} {
		p.state("from the second tab", "delivered")
		p.is("once", `[...document.querySelectorAll('[data-testid=message]')].filter(m => m.innerText.includes("from the second tab")).length === 1`)
	}
	bob.state("from the second tab", "received")

	link.set(true) // all tabs are cut off
	alice.is("alice notices", `document.getElementById("connection").dataset.state !== "online"`)
	alice.say("sent while cut off")
	alice.state("sent while cut off", "pending")
	alice.do(`document.body.id = "old", location.reload()`)
	alice.is("the page is loaded anew", `document.readyState === "complete" && !document.body.id && document.querySelector('[data-testid=conversation]')`)
	alice.do(`document.querySelector('[data-testid=conversation]').click()`)
	alice.state("sent while cut off", "pending")
	link.set(false)
	alice.is("alice is back", `document.getElementById("connection").dataset.state === "online"`)
	bob.is("bob is back", `document.getElementById("connection").dataset.state === "online"`)
	alice.state("sent while cut off", "delivered")
	bob.state("sent while cut off", "received")
	bob.is("once", `[...document.querySelectorAll('[data-testid=message]')].filter(m => m.innerText.includes("sent while cut off")).length === 1`)
}
