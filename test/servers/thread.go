package servers

import "runtime"

// lockThread keeps the calling goroutine on its thread for the rest of its life.
func lockThread() { runtime.LockOSThread() }
