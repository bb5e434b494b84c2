package codec

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseDownstream(t *testing.T) {
	many := make([]string, MaxTargets+1)
	for i := range many {
		many[i] = fmt.Sprintf(`"u%d"`, i)
	}
	for _, tc := range []struct{ name, value, want string }{ // want "": refused; targets|type|id|data|expire|kick
		{"one", `{"target_user_id":"alice","data":{"a":1}}`, `[alice]|new-message|t-2-9|{"a":1}|0|false`},
		{"many", `{"target_user_ids":["a","b","a"],"type":"x","message_id":"m","data":[]}`, `[a b]|x|m|[]|0|false`},
		{"both", `{"target_user_id":"b","target_user_ids":["a","b"],"data":0}`, `[b a]|new-message|t-2-9|0|0|false`},
		{"aliases", `{"user_id":"alice","content":"hi"}`, `[alice]|new-message|t-2-9|{"content":"hi"}|0|false`},
		{"sender beside targets", `{"user_id":"sender","target_user_id":"bob","data":1}`, `[bob]|new-message|t-2-9|1|0|false`},
		{"null data", `{"target_user_id":"a","data":null}`, `[a]|new-message|t-2-9|null|0|false`},
		{"expires", `{"target_user_id":"a","data":1,"expire_at":5}`, `[a]|new-message|t-2-9|1|5|false`},
		{"kick", `{"target_user_id":"a","type":"kick","data":{"reason":"spam"}}`, `[a]|kick|t-2-9|{"reason":"spam"}|0|true`},
		{"kick without data", `{"target_user_id":"a","type":"kick"}`, `[a]|kick|t-2-9||0|true`},
		{"nulls", `{"target_user_id":"a","data":1,"type":null,"message_id":null,"expire_at":null}`, `[a]|new-message|t-2-9|1|0|false`},
		{"no target", `{"data":1}`, ""},
		{"no targets", `{"target_user_ids":[],"data":1}`, ""},
		{"too many", `{"target_user_ids":[` + strings.Join(many, ",") + `],"data":1}`, ""},
		{"target no string", `{"target_user_id":7,"data":1}`, ""},
		{"targets no array", `{"target_user_ids":"a","data":1}`, ""},
		{"control character", `{"target_user_id":"a\n","data":1}`, ""},
		{"no data", `{"target_user_id":"a"}`, ""},
		{"no JSON", `hello`, ""},
		{"no UTF-8", "{\"target_user_id\":\"a\",\"data\":\"\xff\"}", ""},
		{"empty", ``, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, err := ParseDownstream([]byte(tc.value), "t", 2, 9)
			if tc.want == "" {
				if err == nil {
					t.Errorf("accepted: %+v", d)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprintf("%v|%s|%s|%s|%d|%v", d.Targets, d.Type, d.MessageID, d.Data, d.ExpireAt, d.Kick)
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
			if f := JSON.AppendDownstreamFrame(nil, d, 1); !json.Valid(f) || !strings.Contains(string(f), string(d.Data)) {
				t.Errorf("frame %s", f)
			}
		})
	}
}

// FuzzParseDownstream: whatever is accepted has targets that are users, and makes a frame that is JSON.
func FuzzParseDownstream(f *testing.F) {
	f.Add([]byte(`{"target_user_ids":["a","\u00e9"],"type":"x","data":{"a":[1]},"expire_at":1}`))
	f.Add([]byte(`{"user_id":"alice","content":"hi"}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		d, err := ParseDownstream(value, "t", 0, 0)
		if err != nil {
			return
		}
		if len(d.Targets) == 0 || len(d.Targets) > MaxTargets {
			t.Fatalf("%d targets", len(d.Targets))
		}
		for _, u := range d.Targets {
			if !ValidName(u) {
				t.Fatalf("target %q", u)
			}
		}
		if frame := JSON.AppendDownstreamFrame(nil, d, 1); !json.Valid(frame) || !utf8.Valid(frame) {
			t.Fatalf("frame %q of %q", frame, value)
		}
	})
}

func TestSessionNames(t *testing.T) {
	seen := map[string]bool{}
	for _, id := range []SessionID{1, MakeSessionID(255, 255, MaxIndex, MaxGeneration), MakeSessionID(1, 2, 3, 4), 1 << 63} {
		name := id.Name(42)
		if got, ok := ParseSessionName(name, 42); !ok || got != id {
			t.Errorf("%s: %x, %v, want %x", name, got, ok, id)
		}
		if _, ok := ParseSessionName(name, 43); ok {
			t.Errorf("%s is taken for another process'", name)
		}
		if seen[name] || len(name) != 26 {
			t.Errorf("name %s", name)
		}
		seen[name] = true
	}
	id := MakeSessionID(7, 9, 12345, 678)
	if id.Shard() != 7 || id.Loop() != 9 || id.Index() != 12345 || id.Generation() != 678 {
		t.Errorf("parts %d %d %d %d", id.Shard(), id.Loop(), id.Index(), id.Generation())
	}
	for _, bad := range []string{"", "x", strings.Repeat("u", 26), strings.Repeat("z", 26), strings.Repeat("0", 27)} {
		if _, ok := ParseSessionName(bad, 0); ok {
			t.Errorf("%q is taken", bad)
		}
	}
}
