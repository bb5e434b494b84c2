// Package proto holds the protobuf files of the gateway's and im-logic's interfaces.
package proto

import "embed"

// Files holds them under their import paths, such as im/client/v1/client.proto.
//
//go:embed im
var Files embed.FS
