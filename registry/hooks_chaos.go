//go:build chaos

package registry

import "os"

// releaseBy is a defect that the fault suite must find: an entry is deleted whosoever it is.
func releaseBy(script string) string {
	if os.Getenv("CHAOS_DEFECT") == "unfenced-delete" {
		return `return redis.call('DEL', KEYS[1])`
	}
	return script
}
