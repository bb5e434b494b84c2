//go:build chaos

package broker

import "os"

var commitBeforeDelivery = os.Getenv("CHAOS_DEFECT") == "commit-before-delivery"

// hookRead is a defect that the fault suite must find: the offset is committed before the record has ended.
func hookRead(k *claim, offset int64) {
	if commitBeforeDelivery {
		k.session.MarkOffset(k.topic, k.partition, offset+1, "")
		k.session.Commit()
	}
}
