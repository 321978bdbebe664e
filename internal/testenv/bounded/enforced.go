//go:build !race && !cgo

package bounded

// enforced is false where the race detector takes memory and time of its own,
// and where threads are C's: their stacks would count.
const enforced = true
