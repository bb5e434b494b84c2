package servers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/test/ports"
)

// Kafka is a real Apache Kafka: one node, broker and controller. Topics are not created by use.
type Kafka struct {
	*Process
	Broker     string // PLAINTEXT, with every right
	SASLBroker string // SASL_PLAINTEXT: PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512
	User       string // has every right
	Limited    string // PLAIN only; has no right but those of ACLs that a test adds
	Password   string // of both
	Libs       string // the directory of the jars
}

const kafkaVersion = "4.1.0" // as in kafka/pom.xml

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

// Jars returns the directory of Kafka's jars, in the repository's .cache; Maven fetches them when
// they are not there.
func Jars(ctx context.Context) (string, error) {
	java, maven := program{"java", "openjdk-17-jre-headless"}, program{"mvn", "maven"}
	root, err := repository()
	if err != nil {
		return "", fmt.Errorf("fetch Kafka: %w", err)
	}
	libs := filepath.Join(root, ".cache", "kafka-"+kafkaVersion, "libs")
	if _, err := os.Stat(libs); err == nil {
		return libs, need(java)
	}
	if err := need(java, maven); err != nil {
		return "", err
	}
	parent := filepath.Dir(libs)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", fmt.Errorf("fetch Kafka: %w", err)
	}
	// Whole or not at all, whatever happens meanwhile: it becomes libs by a rename.
	tmp, err := os.MkdirTemp(parent, "libs-")
	if err != nil {
		return "", fmt.Errorf("fetch Kafka: %w", err)
	}
	out, err := exec.CommandContext(ctx, "mvn", "-q", "-B", "-f", filepath.Join(root, pom),
		"dependency:copy-dependencies", "-DoutputDirectory="+tmp, "-DincludeScope=runtime").CombinedOutput()
	if err != nil {
		return "", errors.Join(fmt.Errorf("fetch Kafka with Maven: %w\n%s", err, out), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, libs); err != nil {
		if _, missing := os.Stat(libs); missing != nil {
			return "", errors.Join(fmt.Errorf("fetch Kafka: %w", err), os.RemoveAll(tmp))
		}
		return libs, os.RemoveAll(tmp) // another process was faster
	}
	return libs, nil
}

// pom names what Maven fetches.
const pom = "test/servers/kafka/pom.xml"

// repository returns the directory of the repository, this one or one above.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("where am I: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, pom)); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not in a clone of the repository")
		}
	}
}

// StartKafka starts Kafka with its data below dir.
func StartKafka(ctx context.Context, dir string) (*Kafka, error) {
	libs, err := Jars(ctx)
	if err != nil {
		return nil, err
	}
	var port [3]int
	for i := range port {
		if port[i], err = ports.Number(); err != nil {
			return nil, err
		}
	}
	k := &Kafka{
		Broker: loopback(port[0]), SASLBroker: loopback(port[1]),
		User: "gateway", Limited: "limited", Password: "kafka-pass-7331", Libs: libs,
	}
	properties := filepath.Join(dir, "kafka.properties")
	if err := os.WriteFile(properties, []byte(k.properties(loopback(port[2]), filepath.Join(dir, "kafka"))), 0o600); err != nil {
		return nil, fmt.Errorf("configure Kafka: %w", err)
	}
	id, err := k.tool(ctx, "kafka.tools.StorageTool", "random-uuid").Output()
	if err != nil {
		return nil, fmt.Errorf("make Kafka's cluster id: %w", err)
	}
	login := "=[name=" + k.User + ",password=" + k.Password + "]"
	format := k.tool(ctx, "kafka.tools.StorageTool", "format", "--standalone", "-t", strings.TrimSpace(string(id)),
		"-c", properties, "--add-scram", "SCRAM-SHA-256"+login, "--add-scram", "SCRAM-SHA-512"+login)
	if out, err := format.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("format Kafka's storage: %w\n%s", err, out)
	}
	k.Process = &Process{
		name: "kafka", ready: k.answers,
		make: func() *exec.Cmd {
			return exec.Command("java", "-Xms256m", "-Xmx768m", "-cp", filepath.Join(libs, "*"), "kafka.Kafka", properties)
		},
	}
	return k, k.Start(ctx)
}

// properties is Kafka's configuration.
func (k *Kafka) properties(controller, data string) string {
	scram := "org.apache.kafka.common.security.scram.ScramLoginModule required;"
	plain := "org.apache.kafka.common.security.plain.PlainLoginModule required"
	for _, user := range []string{k.User, k.Limited} {
		plain += " user_" + user + `="` + k.Password + `"`
	}
	return strings.Join([]string{
		"process.roles=broker,controller", "node.id=1",
		"controller.quorum.bootstrap.servers=" + controller,
		"listeners=PLAINTEXT://" + k.Broker + ",SASL_PLAINTEXT://" + k.SASLBroker + ",CONTROLLER://" + controller,
		"advertised.listeners=PLAINTEXT://" + k.Broker + ",SASL_PLAINTEXT://" + k.SASLBroker,
		"controller.listener.names=CONTROLLER",
		"listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
		"sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
		"listener.name.sasl_plaintext.plain.sasl.jaas.config=" + plain + ";",
		"listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config=" + scram,
		"listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=" + scram,
		"authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
		"super.users=User:ANONYMOUS;User:" + k.User,
		"log.dirs=" + data,
		"offsets.topic.replication.factor=1", "offsets.topic.num.partitions=1",
		"group.initial.rebalance.delay.ms=0", "auto.create.topics.enable=false",
		"log.retention.check.interval.ms=300000", "",
	}, "\n")
}

func (k *Kafka) tool(ctx context.Context, class string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "java", append([]string{"-cp", filepath.Join(k.Libs, "*"), class}, args...)...)
}

// answers checks that the broker serves clients.
func (k *Kafka) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := kgo.NewClient(kgo.SeedBrokers(k.Broker))
	if err != nil {
		return fmt.Errorf("ask Kafka: %w", err)
	}
	defer c.Close()
	if err := c.Ping(ctx); err != nil {
		return fmt.Errorf("ask Kafka: %w", err)
	}
	return nil
}

// ConsoleProduce types one line into kafka-console-producer.
func (k *Kafka) ConsoleProduce(ctx context.Context, topic, line string) error {
	cmd := k.tool(ctx, "org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server", k.Broker, "--topic", topic)
	cmd.Stdin = strings.NewReader(line + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("console producer: %w\n%s", err, out)
	}
	return nil
}

// ConsoleConsume returns what kafka-console-consumer prints of one record.
func (k *Kafka) ConsoleConsume(ctx context.Context, topic string, partition int32, offset int64) (string, error) {
	out, err := k.tool(ctx, "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", k.Broker,
		"--topic", topic, "--partition", fmt.Sprint(partition), "--offset", fmt.Sprint(offset),
		"--max-messages", "1", "--timeout-ms", "20000").Output()
	if err != nil {
		return "", fmt.Errorf("console consumer: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
