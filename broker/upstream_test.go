package broker

import (
	"fmt"
	"testing"

	"github.com/IBM/sarama"

	"im-gateway/codec"
)

// loop is a producer whose sarama is a channel: what it is handed comes back as a success.
type loop struct {
	p      *Producer
	input  chan *sarama.ProducerMessage
	g      *gathering
	record *codec.Upstream
}

func newLoop(t testing.TB) *loop {
	t.Helper()
	l := &loop{input: make(chan *sarama.ProducerMessage, gatherMax), record: newUpstream(t, "alice", "c-1", `{"a":1}`)}
	var err error
	l.p, err = NewProducer(testOptions(t, "127.0.0.1:1"), func(b *codec.UpstreamBatch) { l.p.recycle(b) }, testShards)
	if err != nil {
		t.Fatal(err)
	}
	l.p.credits.gate.Store(gateOpen)
	l.g = newGathering(l.p)
	return l
}

// turn sends n records through and takes them back.
func (l *loop) turn(n int) {
	b := l.p.batches.Get().(*codec.UpstreamBatch)
	b.Shard = 1
	for range n {
		if code, _ := l.p.Admit(l.record.Size()); code != codec.OK {
			panic(code)
		}
		b.Records = append(b.Records, l.record)
	}
	l.p.handOver(b, l.input)
	for range n {
		m := <-l.input
		m.Offset = 1
		l.g.add(m, nil)
	}
	l.g.flush()
}

func BenchmarkHandOverAndCollect(b *testing.B) {
	l := newLoop(b)
	b.ReportAllocs()
	for b.Loop() {
		l.turn(100)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/record")
}

func BenchmarkAdmit(b *testing.B) {
	l := newLoop(b)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if code, _ := l.p.Admit(300); code == codec.OK {
				l.p.Cancel(1, 300)
			}
		}
	})
}

// The whole producer, sarama and a fake Kafka in the same process included.
func BenchmarkProducer(b *testing.B) {
	c := newCluster(b)
	answered := make(chan int, 1024)
	p := startProducer(b, testOptions(b, c.ListenAddrs()...), func(batch *codec.UpstreamBatch) { answered <- len(batch.Records) })
	var records []*codec.Upstream
	for i := range 1000 {
		records = append(records, newUpstream(b, fmt.Sprint("user-", i), "c-1", `{"conversation_id":"v1","content":"a message of usual length"}`))
	}
	b.ReportAllocs()
	for b.Loop() {
		for i := 0; i < len(records); i += 100 {
			batch := &codec.UpstreamBatch{Shard: i / 100 % testShards}
			for _, u := range records[i : i+100] {
				if code, _ := p.Admit(u.Size()); code != codec.OK {
					b.Fatal(code)
				}
				batch.Records = append(batch.Records, u)
			}
			p.Queue(batch.Shard) <- batch
		}
		for n := 0; n < len(records); {
			n += <-answered
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(records)), "ns/record")
}
