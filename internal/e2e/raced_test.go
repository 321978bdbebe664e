//go:build race

package e2e

// raced says that the tests were built with the race detector.
const raced = true
