package s3store

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// unsignedPayload stands for the hash of a body that TLS protects.
	unsignedPayload = "UNSIGNED-PAYLOAD"
	emptyPayload    = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// unsigned are headers that proxies, or Go's client, may add to or change.
var unsigned = []string{"accept-encoding", "authorization", "user-agent"}

// sign adds AWS's signature, version 4, to a request for S3 in region. The
// request's URL has been made by [place.url]: its path and query are in the
// form that is signed. payload is the hex SHA-256 of the body, or
// unsignedPayload. A request without credentials stays as it is.
func sign(req *http.Request, c Credentials, region, payload string, now time.Time) {
	if c.AccessKey == "" {
		return
	}
	stamp := now.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", stamp)
	req.Header.Set("X-Amz-Content-Sha256", payload)
	if c.SessionToken != "" {
		req.Header.Set("X-Amz-Security-Token", c.SessionToken)
	}

	headers := map[string]string{"host": req.URL.Host}
	names := []string{"host"}
	for name, values := range req.Header {
		name = strings.ToLower(name)
		if !slices.Contains(unsigned, name) {
			headers[name] = strings.TrimSpace(strings.Join(values, ","))
			names = append(names, name)
		}
	}
	slices.Sort(names)
	signed := strings.Join(names, ";")

	var canonical strings.Builder
	for _, s := range []string{req.Method, req.URL.EscapedPath(), req.URL.RawQuery} {
		canonical.WriteString(s + "\n")
	}
	for _, name := range names {
		canonical.WriteString(name + ":" + headers[name] + "\n")
	}
	canonical.WriteString("\n" + signed + "\n" + payload)

	day := stamp[:len("20060102")]
	scope := day + "/" + region + "/s3/aws4_request"
	toSign := "AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hexSum([]byte(canonical.String()))
	key := []byte("AWS4" + c.SecretKey)
	for _, part := range []string{day, region, "s3", "aws4_request", toSign} {
		m := hmac.New(sha256.New, key)
		m.Write([]byte(part))
		key = m.Sum(nil)
	}
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+c.AccessKey+"/"+scope+", SignedHeaders="+signed+", Signature="+hex.EncodeToString(key))
}

func hexSum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// escape writes s as AWS signs it: all but letters, digits and "-._~" as %XX.
// The slashes of a path stay.
func escape(s string, path bool) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~", c) >= 0, c == '/' && path:
			b.WriteByte(c)
		default:
			b.WriteByte('%')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		}
	}
	return b.String()
}
