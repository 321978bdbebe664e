package e2e

// rootfsRows are what programs do with the root filesystem, and what they are
// kept from.
var rootfsRows = []row{}
