//go:build race || cgo

package bounded

const enforced = false
