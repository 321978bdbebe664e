package index

// The layout of a casync .caibx file. All numbers are little endian.
//
//	 0  u64  48, the size of the header
//	 8  u64  headerType
//	16  u64  feature flags
//	24  u64  minimal, average, maximal chunk size, bytes
//	48  u64  2^64-1: the size of the table is in its tail
//	56  u64  tableType
//	64       an entry of 40 bytes per chunk: u64 end of the chunk in the
//	         image, 32 bytes ID
//	 …  u64  0
//	    u64  0
//	    u64  48, the size of the header
//	    u64  size of the table from offset 48 on, bytes
//	    u64  tailMarker
const (
	headerSize = 48
	tableStart = headerSize + 16
	entrySize  = 40
	tailSize   = 40

	headerType = 0x96824d9c7b129ff9
	tableType  = 0xe75b9e112f17417d
	tailMarker = 0x4b4f050e5549ecd1
)

// Feature flags. All but flagSHA512_256 tell how casync chose the files of an
// archive and mean nothing for a blob; casync sets two of them on every index.
const (
	flagExcludeNodump           = 1 << 63
	flagExcludeSubmounts        = 1 << 62
	flagSHA512_256              = 1 << 61
	flagExcludeFile             = 1 << 60
	knownFlags           uint64 = flagExcludeNodump | flagExcludeSubmounts | flagSHA512_256 | flagExcludeFile
)
