package e2e

// volumeRows are what is mounted into a container.
var volumeRows = []row{}
