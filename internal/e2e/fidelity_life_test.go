package e2e

// lifeRows are what happens to a container after it has started.
var lifeRows = []row{}
