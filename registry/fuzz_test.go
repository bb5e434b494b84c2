package registry

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// FuzzReadSessions: whatever lies in a user's hash in Redis, what is read of it is ordered, in time and
// names its session; a session as the scripts write it is read back.
func FuzzReadSessions(f *testing.F) {
	f.Add("s:a", "g|1|2|3|phone|d", "session_id", "a", "gateway_id", "g", int64(0))
	f.Add("s:", "g|9223372036854775807|2|3||d|e|f", "connected_at", "x", "gateway_id", "g", int64(2))
	f.Add("s:b", "|||||", "s:c", "g|1|-1|+3|\x00|", "version", "1e9", int64(-5))
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2, k3, v3 string, expired int64) {
		hash := map[string]string{k1: v1, k2: v2, k3: v3}
		list := readSessions(hash, expired)
		if len(list) > len(hash) {
			t.Fatalf("%d sessions of %q", len(list), hash)
		}
		for i, at := range list {
			if i > 0 && at.Version > list[i-1].Version {
				t.Errorf("%q gives %+v", hash, list)
			}
			if value, ok := hash[sessionField+at.Session]; !ok && hash["session_id"] != at.Session {
				t.Errorf("%q has no session %q", hash, at.Session)
			} else if got, expires, fine := readSession(at.Session, value); ok && fine && (expires < expired || got != at) {
				t.Errorf("%q gives %+v", hash, list)
			}
		}
		want := Location{GatewayID: strings.ReplaceAll(k1, "|", ""), Session: k2, ConnectedAt: expired, Version: int64(len(v1)),
			DeviceKind: strings.ReplaceAll(v2, "|", ""), DeviceID: v3}
		written := fmt.Sprintf("%s|%d|%d|%d|%s|%s", want.GatewayID, want.Version, expired, want.ConnectedAt, want.DeviceKind, want.DeviceID)
		if at, expires, ok := readSession(k2, written); !ok || at != want || expires != expired {
			t.Errorf("%q: %+v, %d, %v", written, at, expires, ok)
		}
	})
}

// FuzzEndpoint: an entry in etcd gives an address or an error; one that we write is read back.
func FuzzEndpoint(f *testing.F) {
	f.Add([]byte(`{"Op":0,"Addr":"10.0.0.1:9080","Metadata":null}`))
	f.Add([]byte(`{"Addr":""}`))
	f.Add([]byte(`{"addr":"a","Addr":7}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, value []byte) {
		addr, err := endpointAddr(value)
		if (err == nil) != (addr != "") || err == nil && !json.Valid(value) {
			t.Errorf("%q gives %q, %v", value, addr, err)
		}
		if addr == "" {
			return
		}
		written, err := json.Marshal(map[string]any{"Op": 0, "Addr": addr, "Metadata": nil})
		if err != nil {
			t.Fatal(err)
		}
		if again, err := endpointAddr(written); err != nil || again != addr {
			t.Errorf("%q: %q, %v", written, again, err)
		}
	})
}
