package main

import (
	"fmt"
	"io"
	"net"
	"strings"

	"im-gateway/engine"
)

// The demo users. Their passwords are no secret: they exist in this process only.
var demoUsers = []struct{ name, password string }{
	{"alice", "alice-demo"},
	{"bob", "bob-demo-1"},
}

// hello says what to do next.
func hello(w io.Writer, c *engine.Config, gatewayID string, o options) error {
	gw := reachable(c.HTTP.Addr)
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("")
	line("im-gateway is ready. Ctrl-C stops it.")
	line("")
	line("  Chat page   http://%s/   (open it in two tabs)", reachable(o.page))
	user, password := "NAME", "PASSWORD"
	if o.demo {
		user, password = demoUsers[0].name, demoUsers[0].password
		for i, u := range demoUsers {
			line("  %-11s %s / %s", map[bool]string{true: "Users"}[i == 0], u.name, u.password)
		}
	} else {
		line("")
		line("  Register:")
		line(`    curl -s http://%s/api/auth/register -d '{"username":"%s","password":"%s"}'`, gw, user, password)
	}
	login := fmt.Sprintf(`curl -s http://%s/api/auth/login -d '{"username":"%s","password":"%s"}'`, gw, user, password)
	line("")
	line("  Log in:")
	line("    %s", login)
	line("  Connect, then type a message:")
	line(`    TOKEN=$(%s | sed 's/.*"token":"\([^"]*\)".*/\1/')`, login)
	line(`    npx wscat -c ws://%s/ws -H "Authorization: Bearer $TOKEN"`, gw)
	line(`    {"type":"send-message","message_id":"c-1","data":{"to":"bob","content":"hi"}}`)
	line("  Push to %s from Kafka:", user)
	line(`    echo '{"user_id":"%s","content":"hi"}' | kcat -P -b %s -t %s%s`,
		user, c.Kafka.Brokers[0], c.Kafka.DownstreamTopicPrefix, gatewayID)
	line("  Watch what clients send:")
	line(`    kcat -C -u -b %s -t %s`, c.Kafka.Brokers[0], c.Kafka.UpstreamTopic)
	line("")
	token := ""
	if !o.external { // made up for this process, and not somebody's secret
		token = "   (its token is " + c.Admin.Token + ")"
	}
	line("  Admin page  http://%s/%s", reachable(c.Admin.Addr), token)
	line("  Metrics     http://%s/metrics", reachable(c.Admin.Addr))
	line("  Servers     Kafka %s   etcd %s   Redis %s", strings.Join(c.Kafka.Brokers, ","),
		strings.Join(c.Etcd.Endpoints, ","), strings.Join(c.Redis.Addrs, ","))
	line("")
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write to standard output: %w", err)
	}
	return nil
}

// reachable is addr as this machine can call it.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
