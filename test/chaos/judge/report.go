package judge

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Row is one fault of the suite.
type Row struct {
	Name     string        `json:"name"`
	Fault    string        `json:"fault"` // what was done
	Bit      string        `json:"bit"`   // the independent evidence that it had an effect; empty: it was not seen
	Recovery time.Duration `json:"recovery_ns"`
	Verdict  Verdict       `json:"verdict"`
	Ledger   string        `json:"ledger"` // the gateways' own accounts
	Failed   []string      `json:"failed,omitempty"`
}

// Failures are the row's own, the verdict's violations, and a fault that was not seen to bite.
func (r *Row) Failures() []string {
	out := append(slices.Clone(r.Failed), r.Verdict.Violations()...)
	if r.Bit == "" {
		out = append(out, "the fault was not seen to bite")
	}
	return out
}

// WriteMarkdown writes the header, the table and notes for each row.
func WriteMarkdown(w io.Writer, rows []Row, header string) error {
	var b strings.Builder
	if header != "" {
		b.WriteString(strings.TrimRight(header, "\n") + "\n\n")
	}
	b.WriteString("| row | outcome | recovery | acked | false acks | acked lost | inversions | records | lost | in sockets | misdelivered | duplicates up/down | refused | reconnects | longest gap |\n")
	b.WriteString("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i := range rows {
		r := &rows[i]
		outcome := "pass"
		if len(r.Failures()) > 0 {
			outcome = "**fail**"
		}
		f, n := &r.Verdict.Findings, &r.Verdict.Counts
		refused := 0
		for _, k := range n.Refused {
			refused += k
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %d | %d | %d | %d | %d | %d/%d | %d | %d | %s |\n",
			cell(r.Name), outcome, seconds(r.Recovery), n.Acked, f.FalseAcks, f.AckedLost, f.OrderInversions,
			n.Units, f.Lost+f.LostUnexplained, n.LostInSockets, f.Misdelivered, n.Duplicates, n.DuplicatePushes,
			refused, n.Reconnects, seconds(n.LongestGap))
	}
	for i := range rows {
		notes(&b, &rows[i])
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func notes(b *strings.Builder, r *Row) {
	n := &r.Verdict.Counts
	fmt.Fprintf(b, "\n**%s**: %s.", r.Name, strings.TrimRight(r.Fault, "."))
	for _, s := range []struct{ name, text string }{
		{"Bit", r.Bit},
		{"Ledger", r.Ledger},
		{"Refused", counted(n.Refused)},
		{"Closes", counted(n.Closes)},
		{"Undelivered", counted(n.Reasons)},
	} {
		if s.text != "" {
			fmt.Fprintf(b, " %s: %s.", s.name, strings.TrimRight(s.text, "."))
		}
	}
	if n.DeletedAcks+n.DeletedLost > 0 {
		fmt.Fprintf(b, " In the deleted range: %d acknowledged messages, %d records.", n.DeletedAcks, n.DeletedLost)
	}
	b.WriteString("\n")
	for _, f := range r.Failures() {
		fmt.Fprintf(b, "- failed: %s\n", f)
	}
}

// counted lists a map by key.
func counted(m map[string]int) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(out, ", ")
}

func seconds(d time.Duration) string {
	if d == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func cell(s string) string { return strings.NewReplacer("|", `\|`, "\n", " ").Replace(s) }

// WriteJSON writes the rows as an indented array.
func WriteJSON(w io.Writer, rows []Row) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(rows)
}
