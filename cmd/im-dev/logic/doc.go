// Package logic is the reference im-logic: the smallest service that makes a working chat out of
// gateways. It registers and authenticates users (auth.go, users.go, tokens.go), announces itself in
// etcd (register.go), consumes what clients send (upstream.go), keeps conversations (chat.go,
// store.go) and produces to the gateways of those concerned (deliver.go). It uses nothing of the
// gateway but its public contract: the AuthService, the Kafka topics, Redis' user_session entries.
//
// Everything is kept in memory, within bounds, so exactly one instance must run, and a restart
// forgets users and conversations.
//
// # What clients send
//
//	send-message  {conversation_id | to, content, echo?}
//	                                  to all members of the conversation but the sender (with echo:
//	                                  true also to the sender). A direct conversation of alice and
//	                                  bob is "dm:alice:bob" (ids sorted) and begins with its first
//	                                  message; content is any JSON value
//	create-group  {name, members[]}   the sender is a member, too
//	join-group    {conversation_id}
//	delivered     {conversation_id, message_ids[]} (or message_id): these have arrived here
//	sync          {after, conversation_id?, limit?}: what changed after that cursor, 0 for everything
//	                                  that is kept; sent after each `connected`
//
// # What they receive
//
//	new-message        {conversation_id, message_id, client_msg_id, seq, from, from_name, content,
//	                   sent_at, delivered_to[]?}
//	message-delivered  {conversation_id, message_id, client_msg_id, user_id, delivered_to[]}: to the
//	                   sender of the message
//	conversation       {conversation_id, kind: "dm" | "group", name, members[{user_id, name, known}]}
//	                   when it begins or changes; known: false means that the user has not signed up
//	sync               {conversations[], messages[], after, more}: ask again with this after, at once
//	                   when more is true
//	chat-error         {client_msg_id, code, message}: INVALID_DATA, CONVERSATION_UNKNOWN, NOT_A_MEMBER,
//	                   LIMIT_REACHED
//
// A message is processed once per (user_id, client_msg_id). seq orders the messages of a
// conversation; the cursor of sync must be taken from sync answers only, as live messages may
// arrive in another order.
package logic
