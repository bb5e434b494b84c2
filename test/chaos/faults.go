package main

// faults are the rows, in the order of the table.
var faults = []fault{
	{name: "no fault", what: "traffic alone", do: noFault},

	{name: "kafka broker killed", what: "one of three brokers SIGKILLed, back after 15 s", short: true, do: brokerKilled},
	{name: "kafka all stopped", what: "all brokers SIGKILLed for 60 s", do: allBrokersStopped},
	{name: "kafka leaders moved", what: "another broker made the leader of every partition", do: leadersMoved},
	{name: "kafka slow", what: "500 ms of latency each way to all brokers for 15 s", do: kafkaSlow},
	{name: "kafka bandwidth", what: "4 KB/s to and from each broker for 15 s", do: kafkaBandwidth},
	{name: "kafka reset", what: "connections reset at the brokers' answers, again and again for 10 s", short: true, do: kafkaReset},
	{name: "kafka topic deleted", what: "a gateway's downstream topic deleted under it", do: topicDeleted},
	{name: "kafka disk full", what: "the first broker's disk full, freed after 20 s", do: diskFull},
	{name: "kafka record refused", what: "records larger than the topics take: 60 kB up, 60 kB and 1.5 MB down", do: recordRefused},

	{name: "etcd stopped", what: "etcd SIGKILLed for 60 s", do: etcdStopped},
	{name: "etcd lease revoked", what: "the leases of a gateway's keys revoked", short: true, do: leaseRevoked},
	{name: "etcd slow", what: "400 ms of latency each way to etcd for 15 s", do: etcdSlow},
	{name: "etcd cut from one", what: "one gateway cut off from etcd alone for longer than lease and takeover", do: etcdCut},

	{name: "redis stopped", what: "Redis frozen for 20 s", do: redisStopped},
	{name: "redis empty", what: "Redis killed and started empty", short: true, do: redisEmpty},
	{name: "redis slow", what: "300 ms of latency each way to Redis for 15 s", do: redisSlow},
	{name: "redis readonly", what: "Redis turned into a replica, which refuses writes, for 15 s", do: redisReadOnly},
	{name: "redis failover", what: "Redis killed, its replica promoted in its place", do: redisFailover},

	{name: "im-logic down", what: "nothing listens where im-logic was", do: logicDown},
	{name: "im-logic hangs", what: "im-logic answers nothing", do: logicHangs},
	{name: "im-logic slow", what: "im-logic takes a second", do: logicSlow},
	{name: "im-logic wrong", what: "im-logic answers without token and user, then fails", do: logicWrong},

	{name: "gateway killed", what: "a gateway SIGKILLed, its topic taken over, back after 12 s", short: true, do: gatewayKilled},
	{name: "gateway frozen", what: "a gateway SIGSTOPped for longer than lease and takeover, then SIGCONT", do: gatewayFrozen},
	{name: "gateway files", what: "a gateway with 600 file descriptors and 1,000 clients", do: gatewayFiles},
	{name: "gateway memory", what: "a gateway with an egress budget of 1 MiB, clients that do not read, 16 MiB for them", do: gatewayMemory},
	{name: "gateway shard panic", what: "a panic in a shard", short: true, do: shardPanic},
	{name: "gateway loop panic", what: "a panic in an event loop's handler", do: loopPanic},

	{name: "client never reads", what: "clients that never read, 8 MiB for each", do: neverReads},
	{name: "client drip", what: "clients that read a byte a second, 8 MiB for each", do: dripReads},
	{name: "client vanishes", what: "connections dropped by a proxy without FIN", do: vanishes},
	{name: "client storm", what: "2,000 connections at once, dropped and opened again at once", do: storm},
	{name: "client flood", what: "a client that sends 20,000 messages per second", do: flood},
	{name: "client hops", what: "a user who connects to two gateways in turn as fast as they let him", short: true, do: hops},

	{name: "rolling restart", what: "three gateways restarted in turn by SIGTERM, 5,000 chatting users", users: 5000, every: 5e9, do: rollingRestart},
	{name: "drain by admin", what: "a gateway drained by its admin port", do: adminDrain},
}
