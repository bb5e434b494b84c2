package deploy

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// manifests are the objects that a directory of deploy/kubernetes makes.
type manifests struct {
	set      *appsv1.StatefulSet
	budget   *policyv1.PodDisruptionBudget
	network  *networkingv1.NetworkPolicy
	ingress  *networkingv1.Ingress
	account  *corev1.ServiceAccount
	config   *corev1.ConfigMap
	services map[string]*corev1.Service
}

// build runs kustomize and decodes what it makes by Kubernetes' own types: an unknown field is an error.
func build(t *testing.T, dir string) *manifests {
	t.Helper()
	made, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), root+"/deploy/kubernetes/"+dir)
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		appsv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	m := &manifests{services: map[string]*corev1.Service{}}
	for _, r := range made.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(text, nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, bytes.TrimSpace(text))
		}
		switch o := object.(type) {
		case *appsv1.StatefulSet:
			m.set = o
		case *policyv1.PodDisruptionBudget:
			m.budget = o
		case *networkingv1.NetworkPolicy:
			m.network = o
		case *networkingv1.Ingress:
			m.ingress = o
		case *corev1.ServiceAccount:
			m.account = o
		case *corev1.ConfigMap:
			m.config = o
		case *corev1.Service:
			m.services[o.Name] = o
		default:
			t.Errorf("nothing is known of a %T", o)
		}
	}
	return m
}

// settings is the configuration that the pods run with.
func (m *manifests) settings(t *testing.T) config {
	t.Helper()
	env := map[string]string{}
	for _, e := range m.container().Env {
		if !strings.HasPrefix(e.Name, "IM_") {
			continue
		}
		env[e.Name] = e.Value
		if e.ValueFrom != nil {
			env[e.Name] = "im-gateway-0"
		}
	}
	return load(t, m.config.Data["gateway.yaml"], env, "/etc/im-gateway/secrets")
}

func (m *manifests) container() *corev1.Container { return &m.set.Spec.Template.Spec.Containers[0] }

// TestKubernetes: the objects are as Kubernetes knows them, the gateway takes its configuration, and they agree
// with each other and with it.
func TestKubernetes(t *testing.T) {
	for _, dir := range []string{"base", "ingress"} {
		t.Run(dir, func(t *testing.T) {
			m := build(t, dir)
			c := m.settings(t)
			m.timesAgree(t, c)
			m.memoryAgrees(t, c)
			m.portsAgree(t, c)
			m.namesAgree(t)
			m.leastPrivilege(t)
			if dir == "ingress" && (m.ingress == nil || fmt.Sprint(c["http.trusted_proxies"]) == "[]" ||
				m.services["im-gateway"].Spec.Type != corev1.ServiceTypeClusterIP) {
				t.Errorf("the controller is not let in, or not believed: %v", c["http.trusted_proxies"])
			}
		})
	}
}

// memoryAgrees: Go's limit leaves the kernel 4 KB of the pod's memory for each connection.
func (m *manifests) memoryAgrees(t *testing.T, c config) {
	var golimit string
	for _, e := range m.container().Env {
		if e.Name == "GOMEMLIMIT" {
			golimit = e.Value
		}
	}
	limit := m.container().Resources.Limits.Memory().Value()
	forGo, err := resource.ParseQuantity(strings.TrimSuffix(golimit, "B"))
	most, ok := c["websocket.max_connections"].(int)
	if err != nil || !ok || forGo.Value()+int64(most)*4096 > limit {
		t.Errorf("Go may take %s of %d for %d connections: %v", golimit, limit, most, err)
	}
}

// timesAgree: a pod has the time to drain, and to come back before its topic is taken over.
func (m *manifests) timesAgree(t *testing.T, c config) {
	pod, spec := m.container(), m.set.Spec.Template.Spec
	grace := time.Duration(*spec.TerminationGracePeriodSeconds) * time.Second
	before := time.Duration(pod.Lifecycle.PreStop.Sleep.Seconds) * time.Second
	if drain := c.duration(t, "drain.deadline"); before+drain >= grace {
		t.Errorf("a pod is killed after %v, its drain may take %v after %v", grace, drain, before)
	}
	start := time.Duration(pod.StartupProbe.PeriodSeconds*pod.StartupProbe.FailureThreshold) * time.Second
	if after := c.duration(t, "takeover.after"); grace+start > after {
		t.Errorf("topics are taken over after %v, a pod may be away for %v", after, grace+start)
	}
	if pod.ReadinessProbe.HTTPGet.Path != "/readyz" || pod.LivenessProbe.HTTPGet.Path != "/healthz" {
		t.Error("liveness must not ask whether the gateway is ready, and readiness must")
	}
}

// portsAgree: the pods listen where services, probes and policies say.
func (m *manifests) portsAgree(t *testing.T, c config) {
	listens := map[string]string{"http": "http.addr", "admin": "admin.addr", "grpc": "grpc.addr"}
	for _, p := range m.container().Ports {
		if _, port, err := net.SplitHostPort(fmt.Sprint(c[listens[p.Name]])); err != nil || port != fmt.Sprint(p.ContainerPort) {
			t.Errorf("%s is %d, and %s is %v", p.Name, p.ContainerPort, listens[p.Name], c[listens[p.Name]])
		}
		delete(listens, p.Name)
	}
	if len(listens) > 0 {
		t.Errorf("no port for %v", listens)
	}
	for name, s := range m.services {
		for _, p := range s.Spec.Ports {
			if p.TargetPort.StrVal != p.Name {
				t.Errorf("service %s sends %s to %s", name, p.Name, p.TargetPort.StrVal)
			}
		}
	}
	let := map[string]bool{}
	for _, rule := range m.network.Spec.Ingress {
		for _, p := range rule.Ports {
			let[p.Port.StrVal] = true
		}
	}
	if !let["http"] || !let["admin"] || !let["grpc"] {
		t.Errorf("let in: %v", let)
	}
	for _, key := range []string{"kafka.brokers", "redis.addrs", "etcd.endpoints"} {
		for _, addr := range c[key].([]any) {
			if !m.lets(fmt.Sprint(addr)) {
				t.Errorf("%s: no rule lets the pods call %s", key, addr)
			}
		}
	}
}

// lets tells whether a rule lets the pods call a service.namespace:port.
func (m *manifests) lets(addr string) bool {
	host, port, _ := net.SplitHostPort(addr)
	_, namespace, _ := strings.Cut(host, ".")
	for _, rule := range m.network.Spec.Egress {
		for _, p := range rule.Ports {
			for _, peer := range rule.To {
				if p.Port.String() == port && matches(peer.NamespaceSelector, labels.Set{"kubernetes.io/metadata.name": namespace}) {
					return true
				}
			}
		}
	}
	return false
}

func matches(s *metav1.LabelSelector, set labels.Set) bool {
	selector, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && selector.Matches(set)
}

// namesAgree: what selects and mounts finds what it means.
func (m *manifests) namesAgree(t *testing.T) {
	template := m.set.Spec.Template
	pods := labels.Set(template.Labels)
	for what, s := range map[string]*metav1.LabelSelector{
		"the StatefulSet": m.set.Spec.Selector, "the budget": m.budget.Spec.Selector, "the network policy": &m.network.Spec.PodSelector,
		"the spread": template.Spec.TopologySpreadConstraints[0].LabelSelector,
	} {
		if !matches(s, pods) || len(s.MatchLabels) == 0 {
			t.Errorf("%s does not select the pods", what)
		}
	}
	for name, s := range m.services {
		if !labels.SelectorFromSet(s.Spec.Selector).Matches(pods) {
			t.Errorf("service %s does not select the pods", name)
		}
	}
	if s := m.services[m.set.Spec.ServiceName]; s == nil || s.Spec.ClusterIP != corev1.ClusterIPNone {
		t.Errorf("no headless service %s", m.set.Spec.ServiceName)
	}
	// im-logic must not have become a gateway by a label that was written over it.
	if peer := m.network.Spec.Ingress[1].From[1].PodSelector; matches(peer, pods) {
		t.Error("the policy calls the gateways im-logic")
	}
	if template.Spec.ServiceAccountName != m.account.Name {
		t.Errorf("no account %s", template.Spec.ServiceAccountName)
	}
	for _, v := range template.Spec.Volumes {
		if v.ConfigMap != nil && v.ConfigMap.Name != m.config.Name {
			t.Errorf("no ConfigMap %s", v.ConfigMap.Name)
		}
	}
	if m.ingress != nil {
		backend := m.ingress.Spec.Rules[0].HTTP.Paths[0].Backend.Service
		if s := m.services[backend.Name]; s == nil || s.Spec.Ports[0].Name != backend.Port.Name {
			t.Errorf("the Ingress sends to %s %s", backend.Name, backend.Port.Name)
		}
	}
}

// leastPrivilege holds what the "restricted" Pod Security Standard asks for.
func (m *manifests) leastPrivilege(t *testing.T) {
	pod, c := m.set.Spec.Template.Spec, m.container().SecurityContext
	user := "USER " + fmt.Sprintf("%d:%d", *pod.SecurityContext.RunAsUser, *pod.SecurityContext.RunAsGroup)
	if b, err := os.ReadFile(root + "/deploy/Dockerfile"); err != nil || !strings.Contains(string(b), user+"\n") {
		t.Errorf("the image has another user than %s: %v", user, err)
	}
	if !*pod.SecurityContext.RunAsNonRoot || pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault ||
		*c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || fmt.Sprint(c.Capabilities.Drop) != "[ALL]" || *m.account.AutomountServiceAccountToken {
		t.Error("the pods may do more than they need")
	}
}
