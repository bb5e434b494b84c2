package transport

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestConformanceDeflate is the suite's groups 12 and 13, permessage-deflate, with fewer messages where
// they are large, and cases of our own as group 14.
func TestConformanceDeflate(t *testing.T) {
	s := startEcho(t, func(o *Options) {
		o.Settings.MaxMessageBytes, o.Settings.MaxFragments, o.Settings.EgressBudget = 1<<20, 1<<14, 64<<20
		o.Compression = Compression{Enabled: true, Level: 1}
	})
	playAll(t, s, append(deflateCases(), deflateFrameCases()...))
}

// contents are what groups 12.1 to 12.5 send, by kind: 128 KiB each, text but for the odd ones out.
func contents() (kinds []string, binary [5]bool) {
	const size = 128 << 10
	r := rand.New(rand.NewPCG(1, 2))
	var records []map[string]any
	for i := range 2000 {
		records = append(records, map[string]any{"id": i, "name": fmt.Sprint("user-", r.IntN(1000)), "score": r.Float64(), "tags": []string{"a", "b"}})
	}
	list, err := json.Marshal(records)
	if err != nil {
		panic(err)
	}
	bitmap, noise := make([]byte, size), make([]byte, size)
	for i := range bitmap {
		bitmap[i] = byte(i/512) & byte(i%512/3)
		noise[i] = byte(r.Uint32())
	}
	words := strings.Fields("habe nun ach philosophie juristerei und medizin durchaus studiert mit heissem bemuehn da steh ich armer tor")
	var prose, page strings.Builder
	for prose.Len() < size {
		prose.WriteString(words[r.IntN(len(words))] + " ")
		fmt.Fprintf(&page, "<tr><td class=\"c%d\">%s</td></tr>\n", r.IntN(9), words[r.IntN(len(words))])
	}
	kinds = []string{string(list[:size]), string(bitmap), prose.String()[:size], page.String()[:size], string(noise)}
	return kinds, [5]bool{1: true, 4: true}
}

func deflateCases() []conformanceCase {
	kinds, binary := contents()
	const line = "Sec-WebSocket-Extensions: "
	type group struct {
		id, offer string
		kind      int
		agreed    bool
	}
	var groups []group
	for k := range kinds {
		groups = append(groups, group{fmt.Sprintf("12.%d", k+1), line + "permessage-deflate; client_max_window_bits", k, true})
	}
	for i, offer := range []string{
		"permessage-deflate; client_max_window_bits",
		"permessage-deflate; server_no_context_takeover; client_max_window_bits",
		"permessage-deflate; server_max_window_bits=9; client_max_window_bits", // we compress with 15 only
		"permessage-deflate; server_max_window_bits=15; client_max_window_bits",
		"permessage-deflate; server_no_context_takeover; server_max_window_bits=9; client_max_window_bits",
		"permessage-deflate; server_no_context_takeover; server_max_window_bits=15; client_max_window_bits",
		"permessage-deflate; server_no_context_takeover; server_max_window_bits=9; client_max_window_bits, " +
			"permessage-deflate; server_no_context_takeover; client_max_window_bits, permessage-deflate; client_max_window_bits",
	} {
		groups = append(groups, group{fmt.Sprintf("13.%d", i+1), line + offer, 0, i != 2 && i != 4})
	}
	var list []conformanceCase
	for _, g := range groups {
		for i, c := range [][2]int{ // bytes of a message, of a frame
			{16, 0}, {64, 0}, {256, 0}, {1 << 10, 0}, {4 << 10, 0}, {8 << 10, 0}, {16 << 10, 0}, {32 << 10, 0}, {64 << 10, 0}, {128 << 10, 0},
			{8 << 10, 256}, {16 << 10, 256}, {32 << 10, 256}, {64 << 10, 256}, {128 << 10, 256}, {128 << 10, 1 << 10}, {128 << 10, 4 << 10}, {128 << 10, 32 << 10},
		} {
			list = append(list, conformanceCase{
				id: fmt.Sprintf("%s.%d", g.id, i+1), what: fmt.Sprintf("messages of %d in frames of %d", c[0], c[1]),
				make: func() script {
					op := byte(opText)
					if binary[g.kind] {
						op = opBin
					}
					sc := script{offer: g.offer + "\r\n", agreed: g.agreed}
					var in strings.Builder
					n := min(1000, max(2, 256<<10/c[0]))
					for at := range n {
						from := at % 4 * c[0] % (len(kinds[g.kind]) - c[0] + 1)
						payload := kinds[g.kind][from : from+c[0]]
						if !g.agreed {
							in.WriteString(wireMessage(op, payload, c[1]))
							sc.want = append(sc.want, served{fin | op, payload})
							continue
						}
						if at < 4 || at%100 == 0 { // the others are these again: compressing takes long
							in.WriteString(wireMessage(rsv1|op, squeeze(payload), c[1]))
						} else {
							in.WriteString(wire(fin|op, payload)) // not compressed, which is as good
						}
						sc.want = append(sc.want, served{fin | rsv1 | op, payload})
					}
					sc.input = in.String()
					return sc
				},
			})
		}
	}
	return list
}

// deflateFrameCases are what RFC 7692 says of single frames and blocks.
func deflateFrameCases() []conformanceCase {
	const text = "hello hello hello hello hello hello hello"
	small := squeeze(text)
	final := func() string { // with BFINAL set, which is allowed
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, 9)
		if err != nil {
			panic(err)
		}
		_, _ = w.Write([]byte(text))
		_ = w.Close()
		return b.String()
	}()
	want := []served{{fin | rsv1 | opText, text}}
	list := []conformanceCase{
		played("14.1", "a message, then one that is not compressed", 0, append(want, want...), wire(fin|rsv1|opText, small), wire(fin|opText, text)),
		played("14.2", "the bit in every fragment", 1002, nil, wire(rsv1|opText, small[:3]), wire(fin|rsv1|opCont, small[3:])),
		played("14.3", "the bit only in the last fragment", 1002, nil, wire(opBin, small[:3]), wire(fin|rsv1|opCont, small[3:])),
		played("14.4", "the bit in a ping", 1002, nil, wire(fin|rsv1|opPing, small)),
		played("14.5", "the bit in a close", 1002, nil, wire(fin|rsv1|opClose, "\x03\xe8")),
		played("14.6", "another bit beside it", 1002, nil, wire(fin|rsv1|0x20|opText, small)),
		played("14.7", "a ping between fragments", 0, append(pongs("p"), want...), wire(rsv1|opText, small[:3]), wire(fin|opPing, "p"), wire(fin|opCont, small[3:])),
		played("14.8", "empty, in one block", 0, texts(""), wire(fin|rsv1|opText, "\x00")),
		played("14.9", "empty, without the one byte of an empty block", 1007, nil, wire(fin|rsv1|opText, "")),
		played("14.10", "a block that is stored", 0, texts("Hello"), wire(fin|rsv1|opText, "\x00\x05\x00\xfa\xffHello\x00")),
		played("14.11", "two blocks", 0, texts("Hello"), wire(fin|rsv1|opText, "\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00")),
		played("14.12", "a final block", 0, want, wire(fin|rsv1|opText, final+"\x00")),
		played("14.13", "no DEFLATE", 1007, nil, wire(fin|rsv1|opText, "\xff\xff\xff\xff")),
		played("14.14", "cut off", 1007, nil, wire(fin|rsv1|opText, small[:len(small)/2])),
		played("14.15", "a reference before the beginning", 1007, nil, wire(fin|rsv1|opText, "\x02\x01\x00")),
		played("14.16", "no UTF-8 within", 1007, nil, wire(fin|rsv1|opText, squeeze("a\xff"))),
		played("14.17", "the largest that fits", 0, []served{{fin | rsv1 | opBin, strings.Repeat("\x00", 1<<20)}},
			wire(fin|rsv1|opBin, squeeze(strings.Repeat("\x00", 1<<20)))),
		played("14.18", "one byte more", 1009, nil, wire(fin|rsv1|opBin, squeeze(strings.Repeat("\x00", 1<<20+1)))),
		played("14.19", "a bomb", 1009, nil, wire(fin|rsv1|opBin, squeeze(strings.Repeat("\x00", 64<<20)))),
	}
	for i := range list {
		make := list[i].make
		list[i].make = func() script {
			sc := make()
			sc.offer, sc.agreed = offerDeflate, true
			return sc
		}
	}
	return list
}
