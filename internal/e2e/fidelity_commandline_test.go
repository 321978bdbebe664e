package e2e

// commandLineRows are what docker run is told, and what an image's
// configuration says.
var commandLineRows = []row{
	{what: "no arguments", do: ran("IMAGE")},
	{what: "a command with arguments", do: ran("IMAGE", "testapp", "env")},
}
