import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.concurrent.CompletableFuture;

/**
 * Java's own HTTP client against the service, in both of the versions that it can prefer.
 *
 * Takes the service's address and an image file. Prints a line for each answer: the preferred
 * version, the name of the call, the status, the version of the answer, and its body in base64.
 */
class JavaClient {
    private static final String BOUNDARY = "boundary-of-java";

    private final String url;
    private final Path file;
    private final byte[] data;
    private final HttpClient.Version version;
    private final HttpClient client;

    private JavaClient(String url, Path file, HttpClient.Version version) throws Exception {
        this.url = url;
        this.file = file;
        this.data = Files.readAllBytes(file);
        this.version = version;
        this.client = HttpClient.newBuilder().version(version).build();
    }

    public static void main(String[] args) throws Exception {
        for (HttpClient.Version version : HttpClient.Version.values()) {
            new JavaClient(args[0], Path.of(args[1]), version).run();
        }
    }

    private void run() throws Exception {
        send("file", image(BodyPublishers.ofFile(file)));
        send("file, second", image(BodyPublishers.ofFile(file)));
        send("stream", image(stream()));
        send("stream, second", image(stream()));
        send("expects 100", image(BodyPublishers.ofFile(file)).expectContinue(true));
        send("form", to("/predict", "multipart/form-data; boundary=" + BOUNDARY).POST(form()));
        send("json", to("/predict", "application/json").POST(json()));
        send("models", to("/models", null).GET());
        send("wrong option", to("/predict?topk=1", "image/png").POST(stream()));
        send("no type", to("/predict", null).POST(BodyPublishers.ofFile(file)));
        send("wrong method", to("/predict", "image/png").PUT(BodyPublishers.ofFile(file)));
        send("after errors", image(BodyPublishers.ofFile(file)));
        List<CompletableFuture<HttpResponse<byte[]>>> answers = new ArrayList<>();
        for (int count = 0; count < 8; count++) {
            HttpRequest request = image(BodyPublishers.ofFile(file)).build();
            answers.add(client.sendAsync(request, BodyHandlers.ofByteArray()));
        }
        for (CompletableFuture<HttpResponse<byte[]>> answer : answers) {
            print("at once", answer.get());
        }
    }

    private HttpRequest.Builder to(String target, String contentType) {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(url + target));
        request.timeout(Duration.ofSeconds(30));
        return contentType == null ? request : request.header("Content-Type", contentType);
    }

    private HttpRequest.Builder image(BodyPublisher body) {
        return to("/predict", "image/png").POST(body);
    }

    /** Of unknown length: it is sent in chunks. */
    private BodyPublisher stream() {
        return BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(data));
    }

    private BodyPublisher form() {
        String head = "--" + BOUNDARY + "\r\n"
            + "Content-Disposition: form-data; name=\"image\"; filename=\"image.png\"\r\n"
            + "Content-Type: image/png\r\nContent-Length: " + data.length + "\r\n\r\n";
        String end = "\r\n--" + BOUNDARY + "--\r\n";
        return BodyPublishers.ofByteArrays(List.of(bytes(head), data, bytes(end)));
    }

    private BodyPublisher json() {
        String text = Base64.getMimeEncoder().encodeToString(data).replace("\r\n", "\\r\\n");
        return BodyPublishers.ofString("{\"images\": [{\"data\": \"" + text + "\"}]}");
    }

    private static byte[] bytes(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private void send(String name, HttpRequest.Builder request) throws Exception {
        print(name, client.send(request.build(), BodyHandlers.ofByteArray()));
    }

    private void print(String name, HttpResponse<byte[]> answer) {
        String body = Base64.getEncoder().encodeToString(answer.body());
        System.out.println(String.join("\t", version.name(), name,
            Integer.toString(answer.statusCode()), answer.version().name(), body));
    }
}
