package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"im-gateway/codec/gatewaypb"
)

// write writes an answer as it was asked for.
func (c *ctl) write(command *ctlCommand, answer proto.Message) error {
	if c.output == "json" {
		e := json.NewEncoder(c.stdout)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(plain(answer.ProtoReflect()))
	}
	table := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	command.show(table, answer)
	return table.Flush()
}

// plain is a message as JSON that scripts like: every field, by its name in the .proto file, and numbers as
// numbers (protojson writes those of 64 bits as text; none here is near 2^53).
func plain(m protoreflect.Message) map[string]any {
	out := map[string]any{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		one := func(v protoreflect.Value) any {
			if f.Message() != nil && !f.IsMap() {
				return plain(v.Message())
			}
			return v.Interface()
		}
		switch v := m.Get(f); {
		case f.IsList():
			list := []any{}
			for j := range v.List().Len() {
				list = append(list, one(v.List().Get(j)))
			}
			out[f.TextName()] = list
		case f.IsMap():
			byKey := map[string]any{}
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				byKey[k.String()] = v.Interface()
				return true
			})
			out[f.TextName()] = byKey
		default:
			out[f.TextName()] = one(v)
		}
	}
	return out
}

func showStatus(w io.Writer, m proto.Message) {
	s := m.(*gatewaypb.StatusResponse)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	line("gateway", "%s, version %s", s.GetGatewayId(), s.GetVersion())
	line("state", "%s, up %s", s.GetState(), between(s.GetStartedAt(), s.GetNow()))
	for _, c := range s.GetMissing() {
		line("waiting for", "%s: %s", c.GetName(), c.GetReason())
	}
	line("sessions", "%d of %d users", s.GetSessions(), s.GetUsers())
	line("connections", "%d, at most %d", s.GetConnections(), s.GetConnectionsBound())
	line("in flight", "%d messages to Kafka", s.GetUpstreamInFlight())
	limit := "no limit"
	if n := s.GetMemoryLimitBytes(); n != 0 {
		limit = "limit " + size(n)
	}
	line("memory", "%s, %s", size(s.GetMemoryBytes()), limit)
	line("log level", "%s", s.GetLogLevel())
	acting := "with admin.token"
	if !s.GetActing() {
		acting = "off: no admin.token is configured"
	}
	line("acting", "%s", acting)
	fmt.Fprintln(w, "\nDEPENDENCY\tSTATE\tFOR\tERROR")
	for _, d := range s.GetDependencies() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", d.GetName(), d.GetState(), between(d.GetSince(), s.GetNow()), d.GetError())
	}
}

func showLedger(w io.Writer, m proto.Message) {
	l := m.(*gatewaypb.LedgerResponse)
	for i, side := range []struct {
		name    string
		account *gatewaypb.Account
	}{{"CLIENT MESSAGES", l.GetUpstream()}, {"DELIVERIES", l.GetDownstream()}} {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s\t%d\n", side.name, side.account.GetIn())
		ends := side.account.GetEnds()
		for _, name := range slices.Sorted(maps.Keys(ends)) {
			fmt.Fprintf(w, "  %s\t%d\n", name, ends[name])
		}
		fmt.Fprintf(w, "  open\t%d\n", side.account.GetOpen())
		if !side.account.GetBalanced() {
			fmt.Fprintln(w, "  (still counting: this does not add up yet)")
		}
	}
}

func showQueues(w io.Writer, m proto.Message) {
	fmt.Fprintln(w, "QUEUE\tHOLDS\tAT MOST\tUNIT\tWAS FULL\tWHEN FULL")
	for _, q := range m.(*gatewaypb.QueuesResponse).GetQueues() {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%d\t%s\n", q.GetName(), q.GetDepth(), q.GetBound(), q.GetUnit(), q.GetOverflows(), q.GetWhenFull())
	}
}

func showTalkers(w io.Writer, m proto.Message) {
	t := m.(*gatewaypb.TopTalkersResponse)
	perSecond := func(n int64) float64 { return float64(n) * 1000 / float64(max(t.GetWindowMs(), 1)) }
	list := func(title string, talkers []*gatewaypb.Talker, figures func(*gatewaypb.Talker) (n, bytes int64)) {
		fmt.Fprintf(w, "%s\tPER SECOND\tBYTES PER SECOND\n", title)
		for _, k := range talkers {
			n, b := figures(k)
			fmt.Fprintf(w, "%s\t%.1f\t%.0f\n", k.GetUserId(), perSecond(n), perSecond(b))
		}
		if len(talkers) == 0 {
			fmt.Fprintln(w, "(nobody)")
		}
		fmt.Fprintln(w)
	}
	list("SEND MOST", t.GetSenders(), func(k *gatewaypb.Talker) (int64, int64) { return k.GetMessagesIn(), k.GetBytesIn() })
	list("ARE SENT MOST", t.GetReceivers(), func(k *gatewaypb.Talker) (int64, int64) { return k.GetMessagesOut(), k.GetBytesOut() })
	fmt.Fprintf(w, "%d users active in %.1f s\n", t.GetUsers(), float64(t.GetWindowMs())/1000)
	if t.GetMissed() > 0 {
		fmt.Fprintf(w, "%d messages and deliveries of further users were not told apart\n", t.GetMissed())
	}
}

func showFound(w io.Writer, m proto.Message) {
	f := m.(*gatewaypb.FindUserResponse)
	if len(f.GetSessions())+len(f.GetElsewhere()) > 0 {
		fmt.Fprintln(w, "GATEWAY\tSESSION\tSTATE\tSINCE\tIN\tOUT\tWAITING\tDEVICE")
	}
	for _, s := range f.GetSessions() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\n", f.GetGatewayId(), s.GetSessionId(), s.GetState(), at(s.GetConnectedAt()),
			s.GetMessagesIn(), s.GetMessagesOut(), size(s.GetPendingBytes()), device(s.GetDevice(), s.GetDeviceId()))
	}
	for _, p := range f.GetElsewhere() {
		fmt.Fprintf(w, "%s\t%s\t-\t%s\t-\t-\t-\t%s\n", p.GetGatewayId(), p.GetSessionId(), at(p.GetConnectedAt()),
			device(p.GetDevice(), p.GetDeviceId()))
	}
	if e := f.GetElsewhereError(); e != "" {
		fmt.Fprintf(w, "Redis does not say where else: %s\n", e)
	}
}

func foundNothing(m proto.Message) error {
	f := m.(*gatewaypb.FindUserResponse)
	if len(f.GetSessions())+len(f.GetElsewhere()) > 0 {
		return nil
	}
	if f.GetElsewhereError() != "" {
		return fmt.Errorf("%s has no session on %s", f.GetUserId(), f.GetGatewayId())
	}
	return fmt.Errorf("%s has no session on %s, and Redis names no other gateway", f.GetUserId(), f.GetGatewayId())
}

func showKicked(w io.Writer, m proto.Message) {
	if n := m.(*gatewaypb.KickUserResponse).GetClosed(); n > 0 {
		fmt.Fprintf(w, "%d closed\n", n)
	}
}

func kickedNobody(m proto.Message) error {
	if m.(*gatewaypb.KickUserResponse).GetClosed() > 0 {
		return nil
	}
	return fmt.Errorf("nothing was closed: the user has no such session on this gateway; find says where the user is")
}

func showLogLevel(w io.Writer, m proto.Message) {
	fmt.Fprintln(w, m.(*gatewaypb.LogLevelResponse).GetLevel())
}

// between is the time between two, both in Unix ms.
func between(from, to int64) string {
	return max(0, time.Duration(to-from)*time.Millisecond).Truncate(time.Second).String()
}

func at(ms int64) string {
	if ms == 0 {
		return "-"
	}
	return time.UnixMilli(ms).UTC().Format(time.RFC3339)
}

func device(kind, id string) string {
	if kind != "" && id != "" {
		return kind + " " + id
	}
	return cmp.Or(kind, id, "-")
}

// size is a number of bytes for people.
func size(n int64) string {
	v, unit := float64(n), 0
	for v >= 1024 && unit < 3 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, [...]string{"B", "KiB", "MiB", "GiB"}[unit])
}
