package judge

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	rows := []Row{
		{Name: "one broker killed", Fault: "SIGKILL to broker 2.", Bit: "broker 2 left the metadata", Recovery: 1500 * time.Millisecond, Ledger: "balanced",
			Verdict: Verdict{Counts: Counts{Acked: 41, LongestGap: 3 * time.Second, Refused: map[string]int{"OVERLOADED": 2, "BROKER_UNAVAILABLE": 1}}}},
		{Name: "a|b", Fault: "nothing"},
		{Name: "bad", Fault: "x", Bit: "y", Failed: []string{"the ledger is off"},
			Verdict: Verdict{Findings: Findings{FalseAcks: 3}, Examples: map[string][]string{"false_acks": {"u-1"}}}},
	}
	var b strings.Builder
	if err := WriteMarkdown(&b, rows, "# Faults\n"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"# Faults\n\n| row |",
		"| one broker killed | pass | 1.5 s | 41 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0/0 | 3 | 0 | 3.0 s |\n",
		"**one broker killed**: SIGKILL to broker 2. Bit: broker 2 left the metadata. Ledger: balanced. Refused: BROKER_UNAVAILABLE 1, OVERLOADED 2.\n",
		`| a\|b | **fail** |`,
		"- failed: the fault was not seen to bite\n",
		"- failed: the ledger is off\n- failed: false_acks: 3, e.g. u-1\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
	var j bytes.Buffer
	if err := WriteJSON(&j, rows); err != nil {
		t.Fatal(err)
	}
	var back []Row
	if err := json.Unmarshal(j.Bytes(), &back); err != nil || !reflect.DeepEqual(back, rows) {
		t.Errorf("read back %+v, %v", back, err)
	}
}
