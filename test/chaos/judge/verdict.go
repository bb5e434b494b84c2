package judge

import (
	"fmt"
	"time"
)

// examples is how many cases of a finding are kept as text.
const examples = 10

// Findings are counts of what must not be: any other value than 0 is a violation.
type Findings struct {
	// FalseAcks are successes whose record is not at the told topic, partition and offset (when told)
	// with the same client_msg_id and user_id.
	FalseAcks int `json:"false_acks"`
	// AckedLost are acknowledged ids of which no record exists; their acks are false too.
	AckedLost int `json:"acked_lost"`
	// DuplicateSameGateway are second records of an id from one gateway that did not die in between,
	// within 60 s and 32 other ids of the user.
	DuplicateSameGateway int `json:"duplicate_same_gateway"`
	// OrderInversions are first occurrences of a one-outstanding client that lie before those of
	// messages it sent earlier, or on another partition.
	OrderInversions int `json:"order_inversions"`
	// CorruptUpstream are records whose data is not what was sent.
	CorruptUpstream int `json:"corrupt_upstream"`
	// Invented are upstream records of a user in the logs who sent no such id.
	Invented int `json:"invented"`
	// Unanswered are messages that a living connection did not answer for 30 s.
	Unanswered int `json:"unanswered"`
	// Protocol are frames that the protocol does not allow.
	Protocol int `json:"protocol"`
	// Lost are downstream records without an end, of users who acknowledge deliveries, or which
	// nobody could read.
	Lost int `json:"lost"`
	// LostUnexplained are those of other users which no broken connection explains.
	LostUnexplained int `json:"lost_unexplained"`
	// Misdelivered are pushes whose record did not name the user.
	Misdelivered int `json:"misdelivered"`
	// UnknownPushes are pushes of which no record exists nor was produced.
	UnknownPushes int `json:"unknown_pushes"`
	// CorruptPushes are pushes whose data is not byte by byte the record's.
	CorruptPushes int `json:"corrupt_pushes"`
	// PresenceWrong are users whom Redis does not place where they are, after one TTL.
	PresenceWrong int `json:"presence_wrong"`
	// RegistrationWrong are living gateways that etcd lacks and others that it names, after one TTL.
	RegistrationWrong int `json:"registration_wrong"`
}

// Counts are what else was counted.
type Counts struct {
	Sent       int `json:"sent"`      // different messages
	Acked      int `json:"acked"`     // different messages with a success
	Unsettled  int `json:"unsettled"` // messages without a success at the end
	Stored     int `json:"stored"`    // upstream records of the logs' users
	Duplicates int `json:"upstream_duplicates"`
	// DeletedAcks are acks excused by a deleted range.
	DeletedAcks int `json:"deleted_acks"`

	// Gone are records that Kafka acknowledged and has no more, as of a dead gateway's removed topic.
	Gone        int `json:"gone"`
	Units       int `json:"units"` // downstream: pairs of record and target
	Received    int `json:"received"`
	Undelivered int `json:"undelivered"`
	Deadletter  int `json:"deadletter"`
	Forwarded   int `json:"forwarded"` // units with a copy on another topic; each has another end too
	// ReceivedAndEnded are units that were received and are on a topic of ends too, as after a lost
	// delivery-ack.
	ReceivedAndEnded int `json:"received_and_ended"`
	// DuplicatePushes are pushes of a message id that the same user and device had already.
	DuplicatePushes int `json:"duplicate_pushes"`
	// LostInSockets are records without an end of users who do not acknowledge, on the way when a
	// connection broke.
	LostInSockets int `json:"lost_in_sockets"`
	// DeletedLost are records without an end in a deleted range.
	DeletedLost int `json:"deleted_lost"`

	Reconnects int            `json:"reconnects"`
	Refused    map[string]int `json:"refused,omitempty"` // acks with an error, by code; handshakes by status
	Closes     map[string]int `json:"closes,omitempty"`  // connections that the client did not end, by code; -1: none came
	Reasons    map[string]int `json:"reasons,omitempty"` // undelivered records by reason
	// LongestGap is the longest time that a sending client waited from one success (or its first
	// message) to the next; GapUser is whose.
	LongestGap time.Duration `json:"longest_gap_ns"`
	GapUser    string        `json:"gap_user,omitempty"`
}

// Verdict is the outcome of a judgement.
type Verdict struct {
	Findings Findings            `json:"findings"`
	Counts   Counts              `json:"counts"`
	Examples map[string][]string `json:"examples,omitempty"` // of each finding, at most 10
}

// list names the findings as the JSON does.
func (f *Findings) list() []struct {
	name string
	n    int
} {
	return []struct {
		name string
		n    int
	}{
		{"false_acks", f.FalseAcks},
		{"acked_lost", f.AckedLost},
		{"duplicate_same_gateway", f.DuplicateSameGateway},
		{"order_inversions", f.OrderInversions},
		{"corrupt_upstream", f.CorruptUpstream},
		{"invented", f.Invented},
		{"unanswered", f.Unanswered},
		{"protocol", f.Protocol},
		{"lost", f.Lost},
		{"lost_unexplained", f.LostUnexplained},
		{"misdelivered", f.Misdelivered},
		{"unknown_pushes", f.UnknownPushes},
		{"corrupt_pushes", f.CorruptPushes},
		{"presence_wrong", f.PresenceWrong},
		{"registration_wrong", f.RegistrationWrong},
	}
}

// Violations describes each finding that is not 0, with an example; none: the row passes.
func (v *Verdict) Violations() []string {
	var out []string
	for _, f := range v.Findings.list() {
		if f.n == 0 {
			continue
		}
		s := fmt.Sprintf("%s: %d", f.name, f.n)
		if e := v.Examples[f.name]; len(e) > 0 {
			s += ", e.g. " + e[0]
		}
		out = append(out, s)
	}
	return out
}

// found counts a finding and keeps it as an example while there is room.
func (v *Verdict) found(n *int, name, format string, args ...any) {
	*n++
	v.example(name, format, args...)
}

func (v *Verdict) example(name, format string, args ...any) {
	if len(v.Examples[name]) < examples {
		v.Examples[name] = append(v.Examples[name], fmt.Sprintf(format, args...))
	}
}
