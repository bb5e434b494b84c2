package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// eventPage is a page that has event streams, by EventSource and by fetch, of gateways elsewhere.
const eventPage = `<!doctype html><meta charset="utf-8"><title>events</title><script>
"use strict";
const streams = {};
function open(name, url, heeds) {
  const s = streams[name] = {types: [], refusals: 0, opened: 0};
  s.source = new EventSource(url);
  s.source.onopen = () => s.opened++;
  s.source.onmessage = e => {
    s.last = JSON.parse(e.data);
    s.lastId = e.lastEventId;
    s.types.push(s.last.type);
    if (s.last.type === "connected") s.session = s.last.data.session_id;
  };
  s.source.addEventListener("close", e => {
    s.closed = JSON.parse(e.data);
    if (heeds) s.source.close();
  });
  s.source.onerror = () => s.refusals++;
}
function post(name, gateway, token, message) {
  const s = streams[name];
  delete s.answer;
  fetch(gateway + "/api/messages?session_id=" + s.session, {
    method: "POST", body: JSON.stringify(message),
    headers: {"Authorization": "Bearer " + token, "Content-Type": "application/json"},
  }).then(async r => { s.answer = {status: r.status, ...await r.json()}; }, e => { s.answer = {failed: String(e)}; });
}
function read(name, url, token) {
  const s = streams[name] = {text: ""};
  fetch(url, {headers: {"Authorization": "Bearer " + token}}).then(async r => {
    s.status = r.status;
    const reader = r.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) s.text += part.value;
    s.ended = true;
  }, e => { s.failed = String(e); });
}
</script>`

// TestPageInChromiumEventSource: what browsers make of event streams, from pages of another origin.
func TestPageInChromiumEventSource(t *testing.T) {
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write([]byte(eventPage))
	}))
	t.Cleanup(page.Close)
	stranger := httptest.NewServer(page.Config.Handler)
	t.Cleanup(stranger.Close)
	g := start(t, user("gw"), settings{"http.cors_origins": page.URL, "websocket.allowed_origins": page.URL, "drain.window": "200ms"})
	link := newWire(t, g.addr)
	at, through := "http://"+g.addr, "http://"+link.ln.Addr().String()
	browser := chromium(t)
	tab := newTab(t, browser, page.URL)

	alice := user("alice")
	tokenA := token(t, alice, time.Hour)
	tab.do(fmt.Sprintf(`open("a", %q, true)`, at+"/sse?ack=1&token="+tokenA))
	tab.is("alice is connected", `streams.a.session`)
	produce(t, g, alice, fmt.Sprintf(`{"target_user_id":%q,"message_id":"m-é","data":`+"{\n\"text\":\"a\\nb\"\n}}", alice))
	tab.is("the push", `streams.a.last.type === "new-message" && streams.a.last.data.text === "a\nb" && streams.a.lastId === "m-é"`)
	tab.do(fmt.Sprintf(`post("a", %q, %q, {type: "delivery-ack", data: {delivery_id: streams.a.last.delivery_id}})`, at, tokenA))
	tab.is("the delivery-ack is taken", `streams.a.answer && streams.a.answer.status === 200`)
	eventually(t, "the delivery has ended", func() bool { return g.metric(`im_gateway_shard_ends_total{end="delivered"}`) == "1" })
	tab.do(fmt.Sprintf(`post("a", %q, %q, {type: "post", message_id: "c-1", data: {x: 1}})`, at, tokenA))
	tab.is("the message is stored", `streams.a.answer && streams.a.answer.data && streams.a.answer.data.client_msg_id === "c-1"`)
	find(t, "im-upstream-topic", func(r *kgo.Record) bool { return string(r.Key) == alice && header(r, "client_msg_id") == "c-1" })

	// One that heeds the close event is closed. One that does not stays away all the same, while one that was
	// cut off comes back by itself.
	naive := user("naive")
	tab.do(fmt.Sprintf(`open("naive", %q, false)`, at+"/sse?token="+token(t, naive, time.Hour)))
	tab.is("naive is connected", `streams.naive.session`)
	connect(t, g, alice)
	replaced := connect(t, g, naive)
	tab.is("both are told", `streams.a.closed && streams.a.closed.code === 4500 && streams.naive.closed && streams.naive.closed.code === 4500`)
	tab.is("one is closed, the other would connect again", `streams.a.source.readyState === 2 && streams.naive.source.readyState === 0`)
	tab.do(fmt.Sprintf(`open("cut", %q, true)`, through+"/sse?token="+token(t, user("cut"), time.Hour)))
	tab.is("connected", `streams.cut.session`)
	link.set(true)
	tab.is("cut off", `streams.cut.refusals > 0 && streams.cut.source.readyState === 0`)
	link.set(false)
	tab.is("back again", `streams.cut.opened > 1 && streams.cut.types.filter(t => t === "connected").length > 1`)
	tab.is("and naive is not", `streams.naive.opened === 1 && streams.naive.source.readyState === 0`)
	replaced.send("ping", "", nil)
	replaced.wait("pong")

	// A refused token by its event, and by a status that a page only sees the failure of.
	tab.do(fmt.Sprintf(`open("told", %q, true)`, at+"/sse?auth=close&token=x"))
	tab.is("told", `streams.told.closed && streams.told.closed.code === 4503`)
	tab.do(fmt.Sprintf(`open("refused", %q, true)`, at+"/sse?token=x"))
	tab.is("refused", `streams.refused.source.readyState === 2 && !streams.refused.closed`)

	// With a header, which asks for a preflight; and none of it from elsewhere.
	name := user("fetch")
	tab.do(fmt.Sprintf(`read("fetch", %q, %q)`, at+"/sse", token(t, name, time.Hour)))
	tab.is("read by fetch", `streams.fetch.status === 200 && streams.fetch.text.includes('"type":"connected"')`)
	other := newTab(t, browser, stranger.URL)
	other.do(fmt.Sprintf(`open("a", %q, true)`, at+"/sse?token="+tokenA))
	other.is("a strange page is refused", `streams.a.source.readyState === 2 && streams.a.types.length === 0`)
	other.do(fmt.Sprintf(`read("fetch", %q, %q)`, at+"/sse", tokenA))
	other.is("so is its fetch", `streams.fetch.failed`)

	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	tab.is("the stop is told", `streams.fetch.ended && streams.fetch.text.includes('"type":"reconnect"') &&
		streams.fetch.text.endsWith('event: close\ndata: {"code":4002,"reason":"draining"}\n\n')`)
}
