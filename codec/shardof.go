package codec

import "github.com/cespare/xxhash/v2"

// ShardOf is the shard, 0 to n-1, that owns the user's sessions.
func ShardOf(user string, n int) int {
	if n <= 1 {
		return 0
	}
	return int(xxhash.Sum64String(user) % uint64(n))
}
