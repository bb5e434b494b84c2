package judge

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/redis/rueidis"
	clientv3 "go.etcd.io/etcd/client/v3"

	"im-gateway/test/chaos/traffic"
)

const (
	pollEvery    = 250 * time.Millisecond
	presenceKey  = "user_session:"
	registration = "im-gateway/"
)

// presence compares Redis with the sessions that were open when the log was taken.
func (j *judgement) presence(ctx context.Context) error {
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{j.e.Redis}, DisableCache: true, ForceSingleClient: true})
	if err != nil {
		return err
	}
	defer c.Close()
	wrong := make(map[string]string, len(j.users)) // user -> why
	for user := range j.users {
		wrong[user] = "not looked up"
	}
	until := time.Now().Add(j.e.PresenceTTL)
	for {
		last := !time.Now().Before(until)
		if err := j.lookUp(ctx, c, wrong); err != nil {
			return err
		}
		if last || len(wrong) == 0 {
			break
		}
		if err := wait(ctx, min(pollEvery, time.Until(until))); err != nil {
			return err
		}
	}
	for user, why := range wrong {
		j.v.found(&j.v.Findings.PresenceWrong, "presence_wrong", "%s: %s", user, why)
	}
	return nil
}

// lookUp removes the users whose entry is right and tells why the others' are not.
func (j *judgement) lookUp(ctx context.Context, c rueidis.Client, wrong map[string]string) error {
	users := make([]string, 0, len(wrong))
	cmds := make(rueidis.Commands, 0, len(wrong))
	for user := range wrong {
		users = append(users, user)
		cmds = append(cmds, c.B().Hmget().Key(presenceKey+user).Field("gateway_id", "session_id").Build())
	}
	for i, r := range c.DoMulti(ctx, cmds...) {
		values, err := r.ToArray()
		if err != nil {
			return fmt.Errorf("entry of %s: %w", users[i], err)
		}
		var got [2]string // empty: the field is missing
		for k := range min(len(got), len(values)) {
			if got[k], err = values[k].ToString(); err != nil && !rueidis.IsRedisNil(err) {
				return fmt.Errorf("entry of %s: %w", users[i], err)
			}
		}
		if why := j.compare(users[i], got[0], got[1]); why == "" {
			delete(wrong, users[i])
		} else {
			wrong[users[i]] = why
		}
	}
	return nil
}

// compare returns what is wrong with a user's entry. Of several open sessions any may be named.
func (j *judgement) compare(user, gateway, session string) string {
	var online []traffic.Connect
	for _, c := range j.users[user] {
		if n, ok := c.Online(); ok {
			online = append(online, n)
		}
	}
	is := fmt.Sprintf("gateway %q, session %q", gateway, session)
	switch {
	case len(online) == 0 && gateway == "" && session == "":
		return ""
	case len(online) == 0:
		return "offline, but Redis has " + is
	case slices.ContainsFunc(online, func(n traffic.Connect) bool { return n.Gateway == gateway && n.Session == session }):
		return ""
	default:
		return fmt.Sprintf("online at %q in %q, but Redis has %s", online[0].Gateway, online[0].Session, is)
	}
}

// registration compares the gateways' endpoints in etcd with those alive.
func (j *judgement) registration(ctx context.Context) error {
	if j.e.Etcd == "" {
		return nil
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{j.e.Etcd}, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // only read from
	until := time.Now().Add(j.e.PresenceTTL)
	for {
		last := !time.Now().Before(until)
		wrong, err := j.registered(ctx, c)
		if err != nil {
			return err
		}
		if last || len(wrong) == 0 {
			for _, w := range wrong {
				j.v.found(&j.v.Findings.RegistrationWrong, "registration_wrong", "%s", w)
			}
			return nil
		}
		if err := wait(ctx, min(pollEvery, time.Until(until))); err != nil {
			return err
		}
	}
}

func (j *judgement) registered(ctx context.Context, c *clientv3.Client) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := c.Get(ctx, registration, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, err
	}
	var wrong, names []string
	for _, kv := range resp.Kvs {
		id := strings.TrimPrefix(string(kv.Key), registration)
		names = append(names, id)
		if !slices.Contains(j.e.Gateways, id) {
			wrong = append(wrong, id+" is registered and not alive")
		}
	}
	for _, id := range j.e.Gateways {
		if !slices.Contains(names, id) {
			wrong = append(wrong, id+" is alive and not registered")
		}
	}
	return wrong, nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
